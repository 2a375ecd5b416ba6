"""torchvision's Faster R-CNN: its configuration and its state_dict in this library's terms."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ...config import (
    BackboneConfig,
    DetectionConfig,
    HeadConfig,
    LossConfig,
    ModelConfig,
    NonLocalConfig,
    Norm,
    RoIConfig,
    RPNConfig,
)

PREFIXES = {
    "backbone.": "detector.backbone.",
    "rpn.head.conv.0.0.": "detector.rpn.conv.",
    "rpn.head.cls_logits.": "detector.rpn.objectness.",
    "rpn.head.bbox_pred.": "detector.rpn.deltas.",
    "roi_heads.box_head.fc6.": "detector.heads.fc.tower.1.",
    "roi_heads.box_head.fc7.": "detector.heads.fc.tower.3.",
    "roi_heads.box_predictor.cls_score.": "detector.heads.fc.classifier.",
    "roi_heads.box_predictor.bbox_pred.": "detector.heads.fc.regressor.",
}


def faster_rcnn_config(norm: Norm = "frozen_batch_norm", norm_eps: float = 1e-5) -> ModelConfig:
    """The configuration of `torchvision.models.detection.fasterrcnn_resnet50_fpn`.

    Args:
        norm: "batch_norm" for a model built without pretrained weights, as torchvision does.
        norm_eps: 0.0 for the published COCO_V1 weights.
    """
    return ModelConfig(
        backbone=BackboneConfig("resnet50", norm, norm_eps, weights=None, frozen_stages=0),
        rpn=RPNConfig(post_nms_train=2000),
        roi=RoIConfig(fc_box_scale=1.0),
        head=HeadConfig(kind="fc", non_local=NonLocalConfig(enabled=False)),
        loss=LossConfig(w_fc=1.0, w_conv=1.0, smooth_l1_beta=1 / 9),
        detection=DetectionConfig(),
    )


def convert_faster_rcnn(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a `fasterrcnn_resnet50_fpn` state_dict for `build_detector`'s `fc` kind.

    Raises:
        ValueError: a tensor that such a model does not have, by name.
    """
    converted = {}
    for name, tensor in state.items():
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            raise ValueError(f"state_dict: {name!r} is not part of torchvision's fasterrcnn_resnet50_fpn")
        converted[PREFIXES[prefix] + name.removeprefix(prefix)] = tensor
    return converted
