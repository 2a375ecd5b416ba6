"""The `fc` kind with torchvision's weights is torchvision's Faster R-CNN.

In float64: in float32 the two round differently somewhere, and a random network has boxes whose overlap lies so near
the threshold of NMS that this decides which of them stays.
"""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torchvision.models.detection import _utils, fasterrcnn_resnet50_fpn

from doublehead.config import ImageConfig
from doublehead.interop.torchvision import convert_faster_rcnn, faster_rcnn_config
from doublehead.models import build_detector, losses, rpn

CLASSES = 12
SHORT, LONG = 128, 208  # sides of the resized images
PROPOSALS, SAMPLES = 100, 64  # boxes per image that the head sees, in inference and in training


def few_boxes(config, theirs):
    """`config` with fewer boxes than by default, after a check that those are torchvision's; `theirs` gets as few."""
    rpn, sampler = theirs.rpn, theirs.roi_heads.fg_bg_sampler
    assert (config.rpn.pre_nms_train, config.rpn.pre_nms_test) == tuple(rpn._pre_nms_top_n.values())
    assert (config.rpn.post_nms_train, config.rpn.post_nms_test) == tuple(rpn._post_nms_top_n.values())
    assert (config.roi.samples, config.roi.positive_fraction) == (
        sampler.batch_size_per_image, sampler.positive_fraction,
    )  # fmt: skip
    rpn._post_nms_top_n["testing"] = PROPOSALS
    return dataclasses.replace(
        config,
        rpn=dataclasses.replace(config.rpn, post_nms_test=PROPOSALS),
        roi=dataclasses.replace(config.roi, samples=SAMPLES),
    )


@pytest.fixture(scope="module")
def pair():
    """torchvision's model with random weights that give lively outputs, and ours with the same weights."""
    torch.manual_seed(0)
    image = ImageConfig(min_size=(SHORT,), max_size=LONG)
    theirs = fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=CLASSES, min_size=SHORT, max_size=LONG,
    )  # fmt: skip
    config = few_boxes(faster_rcnn_config("batch_norm"), theirs)
    # A random ResNet's activations explode unless its batch norms know their scale.
    for layer in theirs.backbone.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    theirs.train()
    with torch.no_grad():
        theirs.backbone(torch.randn(2, 3, SHORT, LONG))
        theirs.rpn.head.cls_logits.weight.mul_(30)
        theirs.rpn.head.bbox_pred.weight.mul_(5)
        theirs.roi_heads.box_predictor.cls_score.weight.mul_(12)
        theirs.roi_heads.box_predictor.bbox_pred.weight.mul_(5)
    ours = build_detector(dataclasses.replace(config, image=image), CLASSES)
    ours.load_state_dict(convert_faster_rcnn(theirs.state_dict()))
    return theirs.double(), ours.double()


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(1)
    return [torch.rand(3, *size, dtype=torch.float64) for size in [(120, 200), (210, 150), (97, 333)]]


def test_detections_are_torchvisions(pair, images):
    theirs, ours = pair
    with torch.inference_mode():
        expected, found = theirs.eval()(images), ours.eval()(images)
    assert sum(len(e["boxes"]) for e in expected) > 50
    for e, f in zip(expected, found, strict=True):
        assert f["labels"].tolist() == e["labels"].tolist()
        torch.testing.assert_close(f["boxes"], e["boxes"], atol=1e-4, rtol=0)
        torch.testing.assert_close(f["scores"], e["scores"], atol=1e-6, rtol=0)


def first_of_each(state: torch.Tensor, count: int, positive_fraction: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A sampler without chance: the first positives up to the quota, then the first background."""
    chosen = torch.zeros_like(state, dtype=torch.bool)
    for row in range(len(state)):
        positive = (state[row] == 1).nonzero()[:, 0][: int(count * positive_fraction)]
        background = (state[row] == 0).nonzero()[:, 0][: count - len(positive)]
        chosen[row, torch.cat([positive, background])] = True
    drawn, indices = chosen.int().topk(min(count, state.shape[1]), dim=1)
    return indices, drawn > 0


def test_training_losses_are_torchvisions(pair, images, monkeypatch):
    theirs, ours = (copy.deepcopy(model).train() for model in pair)
    torch.manual_seed(2)
    targets = []
    for image, count in zip(images, (3, 1, 5), strict=True):
        size = torch.tensor([image.shape[2], image.shape[1]] * 2)
        corner = torch.rand(count, 2) * 0.5
        boxes = torch.cat([corner, corner + 0.2 + torch.rand(count, 2) * 0.3], 1) * size
        targets.append({"boxes": boxes, "labels": torch.randint(1, CLASSES, (count,))})

    class Sampler(_utils.BalancedPositiveNegativeSampler):
        def __call__(self, matched_idxs):
            positive, negative = [], []
            for state in matched_idxs:
                state = state.clamp(max=1)
                indices, drawn = first_of_each(state[None], self.batch_size_per_image, self.positive_fraction)
                chosen = torch.zeros_like(state, dtype=torch.bool).index_fill_(0, indices[0][drawn[0]], True)
                positive.append(chosen & (state == 1))
                negative.append(chosen & (state == 0))
            return positive, negative

    theirs.rpn.fg_bg_sampler = Sampler(256, 0.5)
    theirs.roi_heads.fg_bg_sampler = Sampler(SAMPLES, 0.25)
    monkeypatch.setattr(rpn, "sample", first_of_each)
    monkeypatch.setattr(losses, "sample", first_of_each)

    expected = theirs(images, targets)
    found = ours(images, targets)
    names = {
        "loss_rpn_objectness": "loss_objectness",
        "loss_rpn_box": "loss_rpn_box_reg",
        "loss_fc_cls": "loss_classifier",
        "loss_fc_reg": "loss_box_reg",
    }
    assert set(found) == set(names) and set(expected) == set(names.values())
    for ours_name, theirs_name in names.items():
        assert expected[theirs_name] > 0
        torch.testing.assert_close(found[ours_name], expected[theirs_name], rtol=1e-5, atol=1e-7, check_dtype=False)


def test_every_parameter_learns(pair, images):
    """Detections and losses could agree with a graph cut somewhere: every parameter must learn."""
    ours = copy.deepcopy(pair[1]).train()
    targets = [{"boxes": torch.tensor([[20.0, 20, 80, 90]]), "labels": torch.tensor([3])} for _ in images]
    sum(ours(images, targets).values()).backward()
    silent = [name for name, p in ours.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_foreign_tensors_are_named(pair):
    state = dict(pair[0].state_dict(), **{"roi_heads.mask_head.0.0.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="mask_head"):
        convert_faster_rcnn(state)
