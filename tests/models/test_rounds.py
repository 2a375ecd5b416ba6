"""Boxes in rounds, best RoIs first, until no other can enter the best detections: the same detections of fewer RoIs."""

import copy
import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from doublehead.models import build_detector, rounds
from doublehead.models.detections import detect
from doublehead.models.heads import HeadOutput
from doublehead.models.inference import run_heads
from doublehead.models.readout import resolve_readout
from doublehead.models.rounds import Decoding, run_in_rounds, stops_early
from doublehead.models.structures import Proposals
from tests.support.tiny_detectors import batch, lively, tiny

ROIS, CLASSES, SIDE = 300, 4, 200.0


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch):
    monkeypatch.setattr(rounds, "FIRST", 32)
    monkeypatch.setattr(rounds, "NEXT", 16)


def scene(seed: int, images: int, crowded: float) -> tuple[HeadOutput, HeadOutput, Proposals]:
    """Random outputs; `crowded`: the share of the image over which the boxes lie."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(images, ROIS, 2, generator=generator) * SIDE * crowded
    boxes = torch.cat((corners, corners + 5 + 20 * torch.rand(images, ROIS, 2, generator=generator)), dim=2)
    logits = 3 * torch.randn(images * ROIS, CLASSES, generator=generator)
    deltas = torch.randn(images * ROIS, CLASSES, 4, generator=generator)
    logits[5], deltas[9, 2, 1] = torch.nan, torch.inf
    valid = torch.arange(ROIS).expand(images, -1) < torch.tensor([ROIS, 60, 200])[:images, None]
    return HeadOutput(logits, None), HeadOutput(None, deltas), Proposals(boxes, valid)


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("crowded", [0.0, 0.1, 1.0])  # at 0 they suppress each other
@pytest.mark.parametrize("most", [1, 20, 100])
def test_no_detection_is_missed(images, crowded, most):
    readout = resolve_readout(tiny("double_head")).replace(max_detections=most)
    decoding = Decoding(torch.tensor([[SIDE, SIDE]] * images), (10.0, 10.0, 5.0, 5.0))
    left_out = 0
    for seed in range(4):
        classes, boxes, proposals = scene(seed, images, crowded)
        best = classes.logits.softmax(1)[:, 1:].amax(1).view(images, ROIS)
        passes = proposals.valid & (best > readout.least_score)
        seen = torch.zeros_like(passes)
        flat = seen.view(-1)

        def run(numbers, boxes=boxes, seen=flat):
            assert len(numbers) and not seen[numbers].any()  # no RoI twice
            seen[numbers] = True
            return HeadOutput(None, boxes.deltas[numbers])

        output, ran = run_in_rounds(run, classes, proposals, passes, readout, decoding)
        assert ran.equal(seen) and not (ran & ~passes).any()
        every = detect({"fc": classes, "conv": boxes}, readout, proposals, *decoding)
        found = detect({"fc": classes, "conv": output}, readout, Proposals(proposals.boxes, ran), *decoding)
        assert all(mine.equal(wanted) for mine, wanted in zip(found[:4], every[:4], strict=True))
        assert (passes & ~ran)[every.count < most].sum() == 0
        left_out += int((passes & ~ran).sum())
    assert left_out or most == 100


def test_a_detection_that_scores_as_the_rest_does_is_no_end():
    readout = resolve_readout(tiny("double_head")).replace(max_detections=10)
    logits = torch.tensor([0.0, 2.0, 0.0, 0.0]).repeat(ROIS, 1)
    corners = torch.arange(ROIS)[:, None] * 50.0
    proposals = Proposals(
        torch.cat((corners, corners, corners + 9, corners + 9), 1)[None], torch.ones(1, ROIS, dtype=bool)
    )
    decoding = Decoding(torch.tensor([[1e5, 1e5]]), (10.0, 10.0, 5.0, 5.0))
    outputs = HeadOutput(logits, None), HeadOutput(None, torch.zeros(ROIS, CLASSES, 4))
    _, ran = run_in_rounds(
        lambda numbers: HeadOutput(None, outputs[1].deltas[numbers]),
        outputs[0],
        proposals,
        proposals.valid,
        readout,
        decoding,
    )
    assert ran.all()  # they tie, so that the order of the RoIs decides


def test_rounds_are_for_crowded_images_on_a_cpu():
    many, few = torch.ones(2, 100, dtype=bool), torch.arange(100).expand(2, -1) < 32
    readout = resolve_readout(tiny("double_head"))
    assert stops_early(readout, many) and not stops_early(readout, few)
    assert not stops_early(readout, many.to("meta"))
    assert not stops_early(readout.replace(max_detections=0), many)
    with FakeTensorMode() as fake:
        assert not stops_early(readout, fake.from_tensor(many))
    ext = resolve_readout(tiny("double_head_ext"), ext_gate=0.3)
    assert ext.skips and not stops_early(ext, many)  # the conv-head may raise a score


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(0)
    config = tiny("double_head_ext")
    config = dataclasses.replace(
        config, rpn=dataclasses.replace(config.rpn, pre_nms_test=400, post_nms_test=200, nms_iou=0.95)
    )
    return lively(build_detector(config, num_classes=4).detector)


@torch.no_grad()
@pytest.mark.parametrize("fused", [True, False])
def test_a_detector_finds_the_same(original, monkeypatch, fused):
    detector = copy.deepcopy(original)
    if not fused:
        detector.heads["conv"].tower.plain()
    torch.manual_seed(1)
    images = batch()
    detector.set_readout("split")
    few = detector.readout.replace(max_detections=5)
    readouts = [few, detector.readout, few.replace(skip=False), detector.resolve_readout("fused")]
    each = detector.detect_each(images, readouts)
    for readout, expected in zip(readouts, each, strict=True):
        detector.readout = readout
        assert all(value.equal(wanted) for value, wanted in zip(detector(images), expected, strict=True))
    monkeypatch.setattr(rounds, "FIRST", 10**6)
    detector.readout = few
    every = detector(images)
    assert every.count.min() > 0 and each[0].labels.equal(every.labels) and each[0].scores.equal(every.scores)
    torch.testing.assert_close(each[0].boxes, every.boxes, rtol=1e-4, atol=1e-4)
    saved = bool((each[0].box_rois < every.box_rois).all())
    assert saved == fused and (each[0].box_rois <= every.box_rois).all()  # a plain tower cannot skip


@torch.no_grad()
def test_without_what_detections_need_every_passing_roi_gets_a_box(original):
    detector = copy.deepcopy(original)
    detector.set_readout("split")
    images = batch()
    features = detector.backbone(images.pixels)
    proposals, _ = detector.rpn(images, features)
    result = run_heads(detector.heads, detector.roi_pooling, features, proposals, detector.readout)
    assert result.proposals is proposals
