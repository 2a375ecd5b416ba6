"""Matching, sampling and the losses of Equations 1-3."""

import pytest
import torch
from torch.nn.functional import cross_entropy, smooth_l1_loss
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.ops import box_iou

from doublehead.config import LossConfig, ModelConfig, RoIConfig
from doublehead.models.heads import HeadOutput
from doublehead.models.losses import box_loss, classification_loss, head_losses, sample_rois
from doublehead.models.matching import match, sample
from doublehead.models.readout import task_weights
from doublehead.models.structures import Proposals, RoISamples, Targets, pad_targets


def random_boxes(*shape: int) -> torch.Tensor:
    corner = torch.rand(*shape, 2) * 80
    return torch.cat([corner, corner + 1 + torch.rand(*shape, 2) * 40], dim=-1)


@pytest.mark.parametrize("keep_best", [False, True])
def test_match_equals_torchvision(keep_best):
    torch.manual_seed(0)
    boxes = random_boxes(300)
    truth = [random_boxes(n) for n in (1, 4, 9)]
    targets = pad_targets(truth, [torch.ones(len(t), dtype=torch.int64) for t in truth])
    matched, state = match(boxes, targets, 0.5, 0.3, keep_best)
    for row, boxes_of_image in enumerate(truth):
        expected = Matcher(0.5, 0.3, keep_best)(box_iou(boxes_of_image, boxes))
        positive = expected >= 0
        torch.testing.assert_close(state[row] == 1, positive)
        torch.testing.assert_close(state[row] == 0, expected == Matcher.BELOW_LOW_THRESHOLD)
        torch.testing.assert_close(state[row] == -1, expected == Matcher.BETWEEN_THRESHOLDS)
        torch.testing.assert_close(matched[row][positive], expected[positive])


def test_match_of_an_image_without_objects_is_all_background():
    targets = pad_targets([torch.zeros(0, 4), random_boxes(2)], [torch.zeros(0).long(), torch.ones(2).long()])
    matched, state = match(random_boxes(50), targets, 0.5, 0.5, keep_best=True)
    assert (state[0] == 0).all() and (matched[0] == 0).all()


def test_a_ground_truth_box_that_overlaps_nothing_claims_nothing():
    targets = pad_targets([torch.tensor([[500.0, 500, 520, 520]])], [torch.tensor([1])])
    _, state = match(random_boxes(20), targets, 0.7, 0.3, keep_best=True)
    assert (state == 0).all()


def test_sample_respects_quota_and_fills_with_background():
    state = torch.full((3, 1000), -1)
    state[0, :300], state[0, 300:900] = 1, 0  # more of each than wanted
    state[1, :5], state[1, 5:900] = 1, 0  # few positives
    state[2, :40], state[2, 40:70] = 1, 0  # too few of both
    indices, drawn = sample(state, 128, 0.25)
    chosen = state.gather(1, indices)
    assert [(chosen[row][drawn[row]] == 1).sum().item() for row in range(3)] == [32, 5, 32]
    assert [(chosen[row][drawn[row]] == 0).sum().item() for row in range(3)] == [96, 123, 30]
    assert (chosen[drawn] >= 0).all()
    for row in range(3):
        assert indices[row][drawn[row]].unique().numel() == drawn[row].sum()
        assert drawn[row].sum() == (128, 128, 62)[row]
        assert drawn[row].int().diff().max() <= 0  # the drawn ones stand first


def test_sample_draws_evenly():
    torch.manual_seed(0)
    state = torch.zeros(400, 50, dtype=torch.int64)
    state[:, :20] = 1
    indices, _ = sample(state, 20, 0.5)
    hits = torch.bincount(indices.flatten(), minlength=50).double()
    expected = torch.cat([torch.full((20,), 10 / 20), torch.full((30,), 10 / 30)]) * 400
    assert ((hits - expected).abs() < 5 * expected.sqrt()).all()


def test_sample_rois_labels_and_boxes():
    torch.manual_seed(0)
    truth = [random_boxes(3), random_boxes(1)]
    labels = [torch.tensor([3, 1, 2]), torch.tensor([4])]
    targets = pad_targets(truth, labels)
    proposals = Proposals(random_boxes(2, 60), torch.arange(60).expand(2, 60) < torch.tensor([[60], [7]]))
    rois = sample_rois(proposals, targets, RoIConfig(samples=32, positive_fraction=0.25))
    assert rois.boxes.shape == (2, 32, 4)
    for row in range(2):
        iou, best = box_iou(rois.boxes[row], truth[row]).max(dim=1)
        expected = torch.where(iou >= 0.5, labels[row][best], 0)
        torch.testing.assert_close(rois.labels[row], expected)
        positive = rois.labels[row] > 0
        assert positive.any()
        torch.testing.assert_close(rois.matched_boxes[row][positive], truth[row][best][positive])
    assert rois.valid[0].all()
    assert rois.valid[1].sum() == 8  # seven proposals and one ground-truth box
    assert {tuple(b) for b in rois.boxes[1].tolist()} == {tuple(b) for b in rois.boxes[1][rois.valid[1]].tolist()}


def test_sample_rois_of_an_image_without_anything():
    targets = pad_targets([torch.zeros(0, 4)], [torch.zeros(0).long()])
    proposals = Proposals(torch.zeros(1, 5, 4), torch.zeros(1, 5, dtype=torch.bool))
    rois = sample_rois(proposals, targets, RoIConfig(samples=4))
    assert not rois.valid.any() and (rois.labels == 0).all() and rois.boxes.isfinite().all()


def test_losses_equal_torch_on_the_valid_rows():
    torch.manual_seed(0)
    logits, deltas = torch.randn(40, 6), torch.randn(40, 6, 4)
    labels, wanted, valid = torch.randint(0, 6, (40,)), torch.randn(40, 4), torch.rand(40) < 0.7
    torch.testing.assert_close(classification_loss(logits, labels, valid), cross_entropy(logits[valid], labels[valid]))
    rows = (valid & (labels > 0)).nonzero()[:, 0]
    for beta in (1.0, 1 / 9):
        expected = smooth_l1_loss(deltas[rows, labels[rows]], wanted[rows], beta=beta, reduction="sum") / valid.sum()
        torch.testing.assert_close(box_loss(deltas, wanted, labels, valid, beta), expected)


def test_losses_without_any_valid_row_are_zero():
    none = torch.zeros(3, dtype=torch.bool)
    labels = torch.tensor([0, 1, 2])
    assert classification_loss(torch.randn(3, 4), labels, none) == 0
    assert box_loss(torch.randn(3, 4, 4), torch.randn(3, 4), labels, none, 1.0) == 0


def test_ext_weights_are_the_releases_multipliers():
    weights = task_weights("double_head_ext", LossConfig(w_fc=2.0, w_conv=2.5, l_fc=0.7, l_conv=0.8))
    assert weights["fc"] == pytest.approx((1.4, 0.6))
    assert weights["conv"] == pytest.approx((0.5, 2.0))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("fc", {"fc": (2.0, 2.0)}),
        ("double_fc", {"fc_1": (2.0, 0.0), "fc_2": (0.0, 2.0)}),
        ("double_conv", {"conv_1": (2.5, 0.0), "conv_2": (0.0, 2.5)}),
        ("double_head", {"fc": (2.0, 0.0), "conv": (0.0, 2.5)}),
        ("double_head_reverse", {"fc": (0.0, 2.0), "conv": (2.5, 0.0)}),
    ],
)
def test_weights_follow_the_tower(kind, expected):
    assert task_weights(kind, LossConfig()) == expected


def test_head_losses_are_weighted_and_named():
    torch.manual_seed(0)
    boxes, truth = random_boxes(2, 10), random_boxes(2, 10)
    rois = RoISamples(boxes, torch.rand(2, 10) < 0.8, torch.randint(0, 4, (2, 10)), truth)
    outputs = {name: HeadOutput(torch.randn(20, 4), torch.randn(20, 4, 4)) for name in ("fc", "conv")}
    config = ModelConfig(loss=LossConfig(smooth_l1_beta=0.5))
    losses = head_losses(outputs, rois, config)
    wanted = BoxCoder((10.0, 10.0, 5.0, 5.0)).encode_single(truth.flatten(0, 1), boxes.flatten(0, 1))
    labels, valid = rois.labels.flatten(), rois.valid.flatten()
    assert set(losses) == {"loss_fc_cls", "loss_fc_reg", "loss_conv_cls", "loss_conv_reg"}
    for name, (cls, reg) in task_weights("double_head_ext", config.loss).items():
        logits, deltas = outputs[name]
        torch.testing.assert_close(losses[f"loss_{name}_cls"], cls * classification_loss(logits, labels, valid))
        torch.testing.assert_close(losses[f"loss_{name}_reg"], reg * box_loss(deltas, wanted, labels, valid, 0.5))


def test_pad_targets_marks_empty_slots():
    targets = pad_targets([torch.ones(2, 4), torch.zeros(0, 4)], [torch.tensor([1, 2]), torch.zeros(0).long()])
    assert isinstance(targets, Targets)
    assert targets.valid.tolist() == [[True, True], [False, False]]
    assert pad_targets([torch.zeros(0, 4)], [torch.zeros(0).long()]).boxes.shape == (1, 1, 4)
