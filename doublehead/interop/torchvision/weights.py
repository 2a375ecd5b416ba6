"""Converts torchvision's Faster R-CNN: its configuration and its state_dict.

Supported are `fasterrcnn_resnet50_fpn` (version 1), the other builders on a plain ResNet, and the box branch of Mask
and Keypoint R-CNN.  Files from before torchvision 0.13, such as the published COCO weights, lack the last number in the
names of the pyramid's and the RPN's convolutions.
"""

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
from ..loading import Checkpoint
from ..mapping import COUNTER, ConversionError, Foreign, Plan, Project, Rule, Unneeded, map_tensors, refuse
from ..names import BODY, DELTAS, FC, FC1, FC2, LATERAL, OBJECTNESS, OUTPUT, RPN_CONV
from ..shapes import count_classes, find_resnet, pooled_side, shape_of

ACCEPTED = "fasterrcnn_resnet50_fpn (version 1) and the box branch of maskrcnn_ and keypointrcnn_resnet50_fpn"
COCO_V1 = "0 as in the published COCO_V1 detectors and what was fine-tuned from them; a detector that started from "
COCO_V1 += "ImageNet weights alone has 1e-5"
RULES = (
    Rule("backbone.body.**", f"{BODY}.**"),
    Rule("backbone.fpn.inner_blocks.*.0.*", f"{LATERAL}.*.0.*"),
    Rule("backbone.fpn.layer_blocks.*.0.*", f"{OUTPUT}.*.0.*"),
    Rule("backbone.fpn.inner_blocks.*.*", f"{LATERAL}.*.0.*"),
    Rule("backbone.fpn.layer_blocks.*.*", f"{OUTPUT}.*.0.*"),
    Rule("rpn.head.conv.0.0.*", f"{RPN_CONV}.*"),
    Rule("rpn.head.conv.*", f"{RPN_CONV}.*"),
    Rule("rpn.head.cls_logits.*", f"{OBJECTNESS}.*"),
    Rule("rpn.head.bbox_pred.*", f"{DELTAS}.*"),
    Rule("roi_heads.box_head.fc6.*", f"{FC1}.*"),
    Rule("roi_heads.box_head.fc7.*", f"{FC2}.*"),
    Rule("roi_heads.box_predictor.cls_score.*", f"{FC}.classifier.*"),
    Rule("roi_heads.box_predictor.bbox_pred.*", f"{FC}.regressor.*"),
)
UNNEEDED = (
    Unneeded("roi_heads.mask_head.**", "the mask branch"),
    Unneeded("roi_heads.mask_predictor.**", "the mask branch"),
    Unneeded("roi_heads.keypoint_head.**", "the keypoint branch"),
    Unneeded("roi_heads.keypoint_predictor.**", "the keypoint branch"),
)
FOREIGN = (
    Foreign("rpn.head.conv.1.0.*", "version 2 of torchvision's Faster or Mask R-CNN"),
    Foreign("roi_heads.box_head.0.**", "version 2 of torchvision's Faster or Mask R-CNN"),
    Foreign("backbone.fpn.extra_blocks.p6.*", "torchvision's RetinaNet or FCOS"),
    Foreign("head.classification_head.**", "torchvision's RetinaNet, FCOS or SSD"),
    Foreign("backbone.features.**", "torchvision's SSD"),
    Foreign("backbone.body.0.**", "a detector on MobileNet"),
)


def plan(checkpoint: Checkpoint, style: str | None) -> Plan:
    """The plan for converting a torchvision detector."""
    tensors = checkpoint.tensors
    refuse(FOREIGN, tensors, ACCEPTED)
    if style is not None:
        raise ConversionError("--style: torchvision's detectors have one; leave it out")
    backbone = find_resnet(tensors, [f"backbone.body.layer{stage}." for stage in (1, 2, 3, 4)])
    trained = f"backbone.body.bn1.{COUNTER}" in tensors
    lateral = "backbone.fpn.inner_blocks.0.0" if "backbone.fpn.inner_blocks.0.0.weight" in tensors else (
        "backbone.fpn.inner_blocks.0")  # fmt: skip
    channels = shape_of(tensors, f"{lateral}.weight", 4)[0]
    fc_dim, columns = shape_of(tensors, "roi_heads.box_head.fc6.weight", 2)
    branches = {"mask": "Mask R-CNN (its box branch)", "keypoint": "Keypoint R-CNN (its box branch)"}
    kind = next(
        (text for branch, text in branches.items() if any(f"roi_heads.{branch}_" in name for name in tensors)),
        "Faster R-CNN",
    )
    classes = count_classes(
        tensors, "roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred", background_regressed=True
    )
    norm_eps = {} if trained else {"backbone.norm_eps": COCO_V1}
    return Plan(
        kind=f"torchvision's {kind}",
        config=faster_rcnn_config(
            "batch_norm" if trained else "frozen_batch_norm",
            1e-5 if trained else 0.0,
            backbone,
            channels,
            fc_dim,
            pooled_side(columns, channels, "roi_heads.box_head.fc6.weight"),
        ),
        num_classes=classes,
        rules=RULES,
        unneeded=UNNEEDED,
        classes=["person"] if "Keypoint" in kind and classes == 2 else None,
        guessed=norm_eps | {"image.min_size": "torchvision's default", "rpn.anchor_sizes": "torchvision's default"},
    )


PROJECT = Project(
    "torchvision",
    ("backbone.body.conv1.weight", "roi_heads.box_head.fc6.*", "backbone.fpn.inner_blocks.**", "backbone.features.**",
     "head.classification_head.**", "backbone.body.0.**"),
    plan,
)  # fmt: skip


def faster_rcnn_config(
    norm: Norm = "frozen_batch_norm",
    norm_eps: float = 1e-5,
    backbone: str = "resnet50",
    fpn_channels: int = 256,
    fc_dim: int = 1024,
    output_size: int = 7,
) -> ModelConfig:
    """The configuration of `torchvision.models.detection.fasterrcnn_resnet50_fpn`.

    Args:
        norm: "batch_norm" for a model built without pretrained weights, as torchvision does.
        norm_eps: 0.0 for the published COCO_V1 weights.
        backbone, fpn_channels, fc_dim, output_size: for other builders.
    """
    return ModelConfig(
        backbone=BackboneConfig(backbone, norm, norm_eps, weights=None, frozen_stages=0, fpn_channels=fpn_channels),
        rpn=RPNConfig(post_nms_train=2000),
        roi=RoIConfig(output_size=output_size, fc_box_scale=1.0),
        head=HeadConfig(kind="fc", fc_dim=fc_dim, non_local=NonLocalConfig(enabled=False)),
        loss=LossConfig(w_fc=1.0, w_conv=1.0, smooth_l1_beta=1 / 9),
        detection=DetectionConfig(),
    )


def convert_faster_rcnn(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a `fasterrcnn_resnet50_fpn` state_dict for `build_detector`'s `fc` kind.

    Raises:
        ValueError: a tensor that such a model does not have, by name.
    """
    return map_tensors(state, RULES, ()).tensors
