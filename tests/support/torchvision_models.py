"""torchvision's detectors with few channels, and pictures."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models import detection, resnet18
from torchvision.models.detection.faster_rcnn import FasterRCNN, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

CLASSES = 8
SMALL = {"min_size": 64, "max_size": 120}
PYRAMID = [
    "fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn", "maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2",
    "keypointrcnn_resnet50_fpn",
]  # fmt: skip


def one_map(**options) -> FasterRCNN:
    """Built by hand: one feature map, two anchor sizes on it, features of 512 channels."""
    backbone = nn.Sequential(*list(resnet18(weights=None).children())[:-2])
    backbone.out_channels = 512
    return FasterRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(((32, 64, 128),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 5, sampling_ratio=0),
        box_head=TwoMLPHead(512 * 25, 1024),
        **options,
    )


def build(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    options = {"num_classes": CLASSES, **SMALL, "box_score_thresh": 0.15, "rpn_post_nms_top_n_test": 24, **options}
    if name == "one_map":
        model = one_map(**{key: value for key, value in options.items() if key != "num_classes"}, num_classes=CLASSES)
    else:
        model = getattr(detection, name)(weights=None, weights_backbone=None, **options)
    heads = model.roi_heads  # its heads are not what is tested, and take long
    if heads.mask_roi_pool is not None:
        heads.mask_head, heads.mask_predictor = MaskRCNNHeads(256, (8,), 1), MaskRCNNPredictor(8, 8, CLASSES)
    if heads.keypoint_roi_pool is not None:
        heads.keypoint_head, heads.keypoint_predictor = KeypointRCNNHeads(256, (8,)), KeypointRCNNPredictor(8, 3)
    return lively(model)


def lively(model: nn.Module) -> nn.Module:
    """Random weights at which there is something to suppress: batch norms that know their scale, spread outputs."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    model.train()
    with torch.no_grad():
        model.backbone(model.transform(pictures())[0].tensors)
        model.eval()
        largest = {
            model.rpn.head.cls_logits: 8.0,
            model.rpn.head.bbox_pred: 1.0,
            model.roi_heads.box_predictor.cls_score: 6.0,
            model.roi_heads.box_predictor.bbox_pred: 4.0,
        }
        outputs = {layer: [] for layer in largest}
        hooks = [layer.register_forward_hook(lambda layer, _, output: outputs[layer].append(output.flatten()))
                 for layer in largest]  # fmt: skip
        model(pictures())
        for hook, (layer, size) in zip(hooks, largest.items(), strict=True):
            hook.remove()
            layer.weight.mul_(size / torch.cat(outputs[layer]).abs().max())
    return model


def pictures(dtype=torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.rand(3, *size, dtype=dtype) for size in ((60, 100), (105, 75))]
