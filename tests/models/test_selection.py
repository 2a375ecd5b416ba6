"""Heads that run on a selection of the RoIs find what they find when they run on all."""

from __future__ import annotations

import pytest
import torch

from doublehead.models import build_detector
from doublehead.models.conv_tower import ConvTower
from doublehead.models.readout import BRANCHES
from doublehead.models.selection import bring_to_front, may_be_detected, restore, select_boxes
from tests.support.tiny_detectors import batch, lively, tiny

SELECTING = ["double_conv", "double_head"]  # classes from one head, boxes from another with a conv tower


def detector(kind: str, **detection):
    """A float64 detector that finds something, but not in every RoI."""
    torch.manual_seed(1)
    made = lively(build_detector(tiny(kind), num_classes=4).detector)
    for head in made.heads.values():
        if head.classifier is not None:
            torch.nn.init.normal_(head.classifier.weight, std=1.5)
            head.classifier.bias.data[0] = 2.0
    made = made.double()
    best = detect(made, False, score_threshold=0.0).scores[:, 0].min().item()
    made.readout = made.readout.replace(score_threshold=0.8 * best, **detection)
    return made


def images():
    torch.manual_seed(2)
    pixels, sizes = batch()
    return type(batch())(pixels.double(), sizes)


@torch.no_grad()
def detect(model, skip: bool, **detection):
    model.readout = model.readout.replace(skip=skip, **detection)
    return model(images())


@pytest.mark.parametrize("kind", [kind for kind in BRANCHES if kind != "conv5"])  # that has no conv tower to skip
def test_the_exact_skip_changes_no_detection(kind):
    model = detector(kind)
    everything, selected = detect(model, False), detect(model, True)
    assert everything.count.min() > 0
    for name in ("labels", "count"):
        assert getattr(selected, name).equal(getattr(everything, name)), name
    torch.testing.assert_close(selected.boxes, everything.boxes, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(selected.scores, everything.scores, rtol=1e-12, atol=0)
    assert (selected.box_rois < everything.box_rois).all() == (kind in SELECTING)


def test_the_skip_serves_the_split_read_out_of_ext():
    model = detector("double_head_ext")
    threshold = model.readout.detection.score_threshold
    model.set_readout("split")
    model.readout = model.readout.replace(score_threshold=threshold)
    everything, selected = detect(model, False), detect(model, True)
    torch.testing.assert_close(selected.boxes, everything.boxes, rtol=1e-9, atol=1e-9)
    assert selected.labels.equal(everything.labels) and (selected.box_rois < everything.box_rois).all()


def test_the_conv_head_sees_only_the_selected_rois(monkeypatch):
    model = detector("double_head")
    counts = []
    forward = ConvTower.forward
    monkeypatch.setattr(ConvTower, "forward", lambda self, x, count: counts.append(count) or forward(self, x, count))
    found = detect(model, True)
    assert int(counts[0]) == int(found.box_rois.sum()) > 0


@pytest.mark.parametrize("threshold", [0.0, 1.01])
def test_all_rois_or_none_pass(threshold):
    model = detector("double_head")
    everything = detect(model, False, score_threshold=threshold)
    selected = detect(model, True, score_threshold=threshold)
    assert selected.labels.equal(everything.labels)
    assert (selected.box_rois > 0).all() == (threshold == 0)


def test_plain_modules_run_on_all_rois():
    model = detector("double_head")
    expected = detect(model, True)
    model.heads["conv"].tower.fused = False
    found = detect(model, True)
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=1e-9, atol=1e-9)
    assert (found.box_rois > expected.box_rois).all()


@pytest.mark.parametrize("fused", [True, False])
def test_the_gate_of_ext_drops_rois_and_is_off_by_default(fused):
    model = detector("double_head_ext")
    model.heads["conv"].tower.fused = fused
    assert model.config.detection.ext_gate == 0
    everything = detect(model, True)
    gated = detect(model, True, ext_gate=0.4)
    assert (gated.count <= everything.count).all() and gated.count.sum() > 0
    low = detect(model, True, ext_gate=1e-9)
    torch.testing.assert_close(low.boxes, everything.boxes, rtol=1e-9, atol=1e-9)
    if fused:
        assert (gated.box_rois < everything.box_rois).all()
    kept = {tuple(box.tolist()) for box in everything.boxes.flatten(0, 1).round(decimals=6)}
    assert all(tuple(box.tolist()) in kept for box in gated.boxes[0, :1].round(decimals=6))


@pytest.mark.parametrize("gate", [-0.1, 1.0, float("nan")])
def test_a_gate_that_is_no_score_is_named(gate):
    with pytest.raises(ValueError, match="detection.ext_gate: expected 0 .off. or a score below 1"):
        detector("double_head_ext").set_readout("fused", ext_gate=gate)


def test_selection_is_a_permutation_with_the_selected_in_front():
    for selected in ([], [True], [False], [False, True, True, False, True], [True] * 4, [False] * 4):
        chosen = torch.tensor(selected, dtype=torch.bool)
        order, count = bring_to_front(chosen)
        assert count == sum(selected) and count.dtype == torch.int64
        expected = [i for i, yes in enumerate(selected) if yes] + [i for i, yes in enumerate(selected) if not yes]
        assert order.tolist() == expected
        values = torch.rand(len(selected), 2)
        assert restore(values[order], bring_to_front(chosen)).equal(values)


def test_boxes_not_selected_are_nan_and_keep_their_image():
    boxes = torch.arange(24.0).view(2, 3, 4)
    rois = select_boxes(boxes, bring_to_front(torch.tensor([False, True, False, False, False, True])))
    assert rois[:2].tolist() == [[0, 4, 5, 6, 7], [1, 20, 21, 22, 23]]
    assert rois[2:, 1:].isnan().all() and rois[2:, 0].tolist() == [0, 0, 1, 1]


def test_scores_at_the_threshold_pass_and_nan_does_not():
    third = torch.zeros(1, 3)
    assert may_be_detected(third, 1 / 3).item() and not may_be_detected(third, 0.34).item()
    assert not may_be_detected(torch.tensor([[0.0, torch.nan, 9.0]]), 0.1).item()
    assert not may_be_detected(torch.zeros(2, 1), 0.0).any()
