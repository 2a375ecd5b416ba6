"""Faster R-CNN without a pyramid (C4) is torchvision's generic Faster R-CNN with the same modules, in float64."""

import dataclasses

import pytest
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign

from doublehead.config import HeadConfig, ImageConfig
from doublehead.models import build_detector
from doublehead.recipes import RECIPES

CLASSES = 6


def c4_config(**changes):
    model = RECIPES["faster-rcnn-r50-c4"].model
    backbone = dataclasses.replace(model.backbone, name="resnet18", norm="batch_norm", weights=None)
    image = ImageConfig(min_size=(96,), max_size=160)
    rpn = dataclasses.replace(model.rpn, pre_nms_test=200, post_nms_test=60, post_nms_train=30)
    return dataclasses.replace(model, **({"backbone": backbone, "image": image, "rpn": rpn} | changes))


@pytest.fixture(scope="module")
def ours():
    torch.manual_seed(0)
    model = build_detector(c4_config(), CLASSES)
    core = model.detector
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0  # a random ResNet's activations explode unless its batch norms know their scale
    with torch.no_grad():
        core.train()
        core.heads(core.roi_pooling(core.backbone(torch.randn(2, 3, 96, 160)), torch.rand(2, 20, 4).cumsum(-1) * 40))
        core.rpn.objectness.weight.mul_(20)
        core.rpn.deltas.weight.mul_(5)
        core.heads["conv5"].classifier.weight.mul_(12)
        core.heads["conv5"].regressor.weight.mul_(5)
    return model.double().eval()


@pytest.fixture(scope="module")
def theirs(ours):
    """torchvision's parts around our modules: another RPN, RoI pooling, post-processing."""
    core, image = ours.detector, ours.config.image
    ratios, sizes = ours.config.rpn.aspect_ratios, ours.config.rpn.anchor_sizes

    class Body(nn.Module):
        out_channels = 256

        def forward(self, pixels):
            return core.backbone(pixels)[0]

    anchors = AnchorGenerator((sizes,), (ratios,))
    rpn_head = RPNHead(256, len(sizes) * len(ratios))
    rpn_head.conv[0][0].load_state_dict(core.rpn.conv.state_dict())
    # torchvision orders the anchors of a cell by ratio, then size; ours by size, then ratio.
    order = torch.arange(len(sizes) * len(ratios)).view(len(sizes), len(ratios)).T.flatten()
    with torch.no_grad():
        for theirs, our, width in (
            (rpn_head.cls_logits, core.rpn.objectness, 1),
            (rpn_head.bbox_pred, core.rpn.deltas, 4),
        ):
            rows = (order[:, None] * width + torch.arange(width)).flatten()
            theirs.weight.copy_(our.weight[rows])
            theirs.bias.copy_(our.bias[rows])
    predictor = FastRCNNPredictor(512, CLASSES)
    predictor.cls_score.load_state_dict(core.heads["conv5"].classifier.state_dict())
    predictor.bbox_pred.load_state_dict(core.heads["conv5"].regressor.state_dict())
    return FasterRCNN(
        Body(), rpn_anchor_generator=anchors, rpn_head=rpn_head,
        rpn_pre_nms_top_n_test=200, rpn_post_nms_top_n_test=60,
        box_roi_pool=MultiScaleRoIAlign(["0"], 14, 0), box_head=core.heads["conv5"].tower, box_predictor=predictor,
        min_size=96, max_size=160, image_mean=torch.tensor(image.mean).tolist(),
        image_std=torch.tensor(image.std).tolist(),
    ).double().eval()  # fmt: skip


def test_detections_are_torchvisions(ours, theirs):
    torch.manual_seed(1)
    images = [torch.rand(3, *size, dtype=torch.float64) for size in [(120, 180), (200, 150)]]
    with torch.inference_mode():
        expected, found = theirs(images), ours(images)
    assert sum(len(e["boxes"]) for e in expected) > 20
    for e, f in zip(expected, found, strict=True):
        assert f["labels"].tolist() == e["labels"].tolist()
        torch.testing.assert_close(f["boxes"], e["boxes"], atol=1e-4, rtol=0)
        torch.testing.assert_close(f["scores"], e["scores"], atol=1e-6, rtol=0)


def test_sizes_and_training():
    model = build_detector(c4_config(backbone=dataclasses.replace(c4_config().backbone, name="resnet50")), CLASSES)
    core = model.detector
    assert core.rpn.anchors.cells.shape == (1, 15, 4)
    assert [tuple(map_.shape) for map_ in core.backbone(torch.rand(1, 3, 96, 160))] == [(1, 1024, 6, 10)]
    assert core.heads["conv5"].classifier.in_features == 2048
    targets = [{"boxes": torch.tensor([[20.0, 20, 80, 90]]), "labels": torch.tensor([3])}]
    losses = model([torch.rand(3, 96, 150)], targets)
    assert sorted(losses) == ["loss_conv5_cls", "loss_conv5_reg", "loss_rpn_box", "loss_rpn_objectness"]
    sum(losses.values()).backward()
    assert all(p.grad.abs().sum() > 0 for p in core.heads.parameters())
    names = [name for name, _ in model.named_parameters() if "layer4" in name or "conv5" in name]
    assert names and all(name.startswith("detector.heads.conv5.") for name in names)  # not in the backbone too


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"head": HeadConfig("fc")}, "'conv5' and backbone.neck 'none' need each other, got kind 'fc'"),
        ({"backbone": dataclasses.replace(c4_config().backbone, neck="fpn")}, "need each other, got kind 'conv5'"),
        ({"backbone": dataclasses.replace(c4_config().backbone, neck="bifpn")}, "neck: expected 'fpn' or 'none'"),
    ],
)
def test_what_does_not_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        build_detector(c4_config(**changes), CLASSES)
