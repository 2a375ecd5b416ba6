"""The read-out of a detector has one owner: `Detector.readout`, which takes nothing that the heads cannot give."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from doublehead.config import DetectionConfig, LossConfig
from doublehead.models import build_detector
from doublehead.models.readout import EXT_SOURCES, ReadOut, Sources, resolve_readout
from tests.support.tiny_detectors import batch, lively, tiny


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(0)
    return lively(build_detector(tiny("double_head_ext"), num_classes=4).detector)


@pytest.fixture
def detector(original):
    return copy.deepcopy(original)


@torch.no_grad()
def test_what_is_assigned_is_what_runs(detector):
    torch.manual_seed(1)
    images = batch()
    names = list(EXT_SOURCES)
    each = detector.detect_each(images, [detector.resolve_readout(name) for name in names])
    assert not each[0].scores.equal(each[2].scores)
    for name, expected in zip(names, each, strict=True):
        detector.readout = detector.resolve_readout(name)
        assert detector.readout.sources == EXT_SOURCES[name]
        for value, wanted in zip(detector(images), expected, strict=True):
            assert value.equal(wanted)
        detector.set_readout("fused")
        detector.set_readout(name)
        assert detector.readout == resolve_readout(detector.config, name)


@torch.no_grad()
def test_options_of_a_read_out_can_be_replaced(detector):
    detector.readout = detector.readout.replace(score_threshold=1.0)
    assert detector.readout.sources == EXT_SOURCES["fused"]
    assert detector(batch()).count.sum() == 0
    assert detector.config.detection.score_threshold < 1


@pytest.mark.parametrize("name", ["sources", "detection"])
def test_parts_of_the_read_out_can_be_read_and_not_assigned(detector, name):
    assert getattr(detector, name) is getattr(detector.readout, name)
    with pytest.raises(AttributeError):
        setattr(detector, name, getattr(detector.readout, name))


def test_a_read_out_does_not_change(detector):
    with pytest.raises(dataclasses.FrozenInstanceError):
        detector.readout.sources = EXT_SOURCES["fc"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        detector.readout.detection.skip = False


def test_a_read_out_that_the_heads_cannot_give_is_refused(detector):
    before, detection = detector.readout, detector.readout.detection
    with pytest.raises(TypeError, match="readout: expected a ReadOut, as resolve_readout returns, got str"):
        detector.readout = "fc"
    with pytest.raises(ValueError, match="readout: expected .*boxes='conv'.* for 'fused' with fusion 'complementary'"):
        detector.readout = ReadOut(Sources(("fc",), "fc"), detection)
    plain = build_detector(tiny("double_head"), num_classes=4).detector
    with pytest.raises(ValueError, match="detection.readout: 'split' needs head.kind 'double_head_ext'"):
        plain.readout = detector.resolve_readout("split")
    untrained = dataclasses.replace(tiny("double_head_ext"), loss=LossConfig(l_fc=1.0))
    with pytest.raises(ValueError, match="needs the fc-head's box regressor"):
        build_detector(untrained, num_classes=4).detector.readout = detector.resolve_readout("fc")
    with pytest.raises(ValueError, match="detection.ext_gate"):
        detector.readout = detector.readout.replace(ext_gate=1.0)
    assert detector.readout is before


@pytest.mark.parametrize(
    ("name", "options", "skips", "least_score"),
    [
        ("fused", {}, False, None),
        ("fused", {"ext_gate": 0.2}, True, 0.2),
        ("fused", {"ext_gate": 0.2, "skip": False}, True, 0.2),  # the gate drops RoIs whatever the head runs on
        ("split", {}, True, 0.05),
        ("split", {"ext_gate": 0.2}, True, 0.05),  # one classifier: what it says is exact
        ("split", {"skip": False}, False, None),
        ("fc", {}, False, None),
        ("conv", {"ext_gate": 0.2}, False, None),
    ],
)
def test_when_rois_may_be_skipped(name, options, skips, least_score):
    readout = ReadOut(EXT_SOURCES[name], DetectionConfig(readout=name, **options))
    assert readout.skips == skips
    assert not skips or readout.least_score == least_score
