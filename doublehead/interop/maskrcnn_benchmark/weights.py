"""Converts maskrcnn-benchmark's models, and those of the authors' release of Double-Head R-CNN, a fork of it.

Supported are the release's Double-Head (which always holds all four outputs, so that it becomes `double_head_ext`), and
Faster R-CNN with a pyramid, with the box branch of Mask and Keypoint R-CNN.  The networks start from Caffe2's ResNets:
BGR images, stride in the 1x1 convolutions, batch norms without epsilon.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...config import (
    BackboneConfig,
    DetectionConfig,
    HeadConfig,
    LossConfig,
    ModelConfig,
    NonLocalConfig,
    RoIConfig,
    RPNConfig,
)
from ..loading import Checkpoint
from ..mapping import ConversionError, Foreign, Plan, Project, Rule, Unneeded, refuse
from ..names import BODY, CONV, CONV_TOWER, DELTAS, FC, FC1, FC2, LATERAL, OBJECTNESS, OUTPUT, RPN_CONV
from ..shapes import agnostic_rules, count_classes, find_resnet, is_class_agnostic, pooled_side, shape_of
from ..styles import image_config

ACCEPTED = "the authors' Double-Head R-CNN, and Faster R-CNN with a pyramid (box branch of Mask and Keypoint R-CNN)"
MEAN = [102.9801, 115.9465, 122.7717]
EXTRACTOR = "roi_heads.box.feature_extractor"
PREDICTOR = "roi_heads.box.predictor"
STACKS = f"{EXTRACTOR}.shared_nonlocal"
CELLS = "rpn.anchor_generator.cell_anchors"
AGNOSTIC_ROWS = 8
"""Rows of a class-agnostic regressor (CLS_AGNOSTIC_BBOX_REG): the background's (never read) and all classes'."""
COMMON_RULES = (
    Rule("backbone.body.stem.*.*", f"{BODY}.*.*"),
    Rule("backbone.body.layer*.**", f"{BODY}.layer*.**"),
    *(Rule(f"backbone.fpn.fpn_inner{level + 1}.*", f"{LATERAL}.{level}.0.*") for level in range(4)),
    *(Rule(f"backbone.fpn.fpn_layer{level + 1}.*", f"{OUTPUT}.{level}.0.*") for level in range(4)),
    Rule("rpn.head.conv.*", f"{RPN_CONV}.*"),
    Rule("rpn.head.cls_logits.*", f"{OBJECTNESS}.*"),
    Rule("rpn.head.bbox_pred.*", f"{DELTAS}.*"),
    Rule(f"{EXTRACTOR}.fc6.*", f"{FC1}.*"),
    Rule(f"{EXTRACTOR}.fc7.*", f"{FC2}.*"),
)
FASTER_RULES = (
    Rule(f"{PREDICTOR}.cls_score.*", f"{FC}.classifier.*"),
    Rule(f"{PREDICTOR}.bbox_pred.*", f"{FC}.regressor.*"),
)
DOUBLE_RULES = (
    Rule(f"{PREDICTOR}.cls_score.*", f"{CONV}.classifier.*"),
    Rule(f"{PREDICTOR}.bbox_pred.*", f"{CONV}.regressor.*"),
    Rule(f"{PREDICTOR}.cls_score_fc.*", f"{FC}.classifier.*"),
    Rule(f"{PREDICTOR}.bbox_pred_fc.*", f"{FC}.regressor.*"),
    Rule(f"{EXTRACTOR}.nonlocal_conv.bottom.*.*", f"{CONV_TOWER}.0.residual.*.*"),
    Rule(f"{EXTRACTOR}.nonlocal_conv.top.*.*", f"{CONV_TOWER}.0.shortcut.*.*"),
)
UNNEEDED = (
    Unneeded("roi_heads.mask.**", "the mask branch"),
    Unneeded("roi_heads.keypoint.**", "the keypoint branch"),
    Unneeded(f"{CELLS}.*", "anchors, which the recipe makes (compared)"),
)
FOREIGN = (
    Foreign("rpn.head.cls_tower.**", "a RetinaNet of maskrcnn-benchmark"),
    Foreign("rpn.head.bbox_tower.**", "a RetinaNet of maskrcnn-benchmark"),
    Foreign(f"{EXTRACTOR}.head.**", "a Faster R-CNN of maskrcnn-benchmark without a pyramid (C4)"),
    Foreign(f"{EXTRACTOR}.xconvs.**", "a maskrcnn-benchmark model whose box head has convolutions"),
    Foreign(f"{EXTRACTOR}.fc6.0.*", "a maskrcnn-benchmark model with group normalisation"),
    Foreign("backbone.fpn.fpn_inner*.0.*", "a maskrcnn-benchmark model with normalisation or ReLU in the pyramid"),
    Foreign(f"{EXTRACTOR}.cls_nonlocal.**", "a Double-Head with non-local blocks for classification alone"),
    Foreign(f"{EXTRACTOR}.reg_nonlocal.**", "a Double-Head with non-local blocks for regression alone"),
    Foreign("backbone.body.layer*.*.conv2.offset.*", "a maskrcnn-benchmark model with deformable convolutions"),
)


def plan(checkpoint: Checkpoint, style: str | None) -> Plan:
    """The plan for converting a model of maskrcnn-benchmark or of the authors' fork."""
    tensors = checkpoint.tensors
    refuse(FOREIGN, tensors, ACCEPTED)
    if style is not None:
        raise ConversionError("--style: maskrcnn-benchmark has one; leave it out, and --set what differs")
    backbone = find_resnet(tensors, [f"backbone.body.layer{stage}." for stage in (1, 2, 3, 4)])
    channels = shape_of(tensors, "backbone.fpn.fpn_inner1.weight", 4)[0]
    fc_dim, columns = shape_of(tensors, f"{EXTRACTOR}.fc6.weight", 2)
    double = any(name.startswith(f"{EXTRACTOR}.nonlocal_conv.") for name in tensors)
    classes = count_all_classes(tensors, double)
    agnostic = is_class_agnostic(tensors, f"{PREDICTOR}.bbox_pred", classes, AGNOSTIC_ROWS)
    guessed = {"image.min_size": "maskrcnn-benchmark's default", "image.mean": "maskrcnn-benchmark's default"}
    if double:
        stacks, attention = read_stacks(tensors)
        rules = (*COMMON_RULES, *DOUBLE_RULES, *stack_rules(stacks, attention))
        width = shape_of(tensors, f"{EXTRACTOR}.nonlocal_conv.top.0.weight", 4)[0]
        inner = shape_of(tensors, f"{STACKS}.0.theta.weight", 4)[0] if attention else width // 2
        non_local = NonLocalConfig(
            attention, "dot_product", groups=4, relu_after=True, inner_dim=None if 2 * inner == width else inner
        )
        head = HeadConfig(
            "double_head_ext", fc_dim, width, 1 + stacks * (1 + attention), non_local=non_local,
            class_agnostic_boxes=agnostic,
        )  # fmt: skip
        loss = LossConfig()
        fields = ("head.non_local.pairwise", "head.non_local.groups", "roi.conv_box_scale")
        guessed |= dict.fromkeys(fields if attention else fields[2:], "the release's default")
    else:
        rules = (*COMMON_RULES, *FASTER_RULES)
        head = HeadConfig("fc", fc_dim, non_local=NonLocalConfig(enabled=False), class_agnostic_boxes=agnostic)
        loss = LossConfig(w_fc=1.0, w_conv=1.0)
    config = ModelConfig(
        backbone=BackboneConfig(
            backbone, norm_eps=0.0, weights=None, fpn_channels=channels, stride_in_1x1=backbone != "resnet18"
        ),
        rpn=RPNConfig(anchors="legacy", min_size=0.0, straddle=0.0),
        roi=RoIConfig(
            output_size=pooled_side(columns, channels, f"{EXTRACTOR}.fc6.weight"),
            level_rule="maskrcnn_benchmark", conv_box_scale=1.3,
        ),
        head=head,
        loss=loss,
        detection=DetectionConfig(min_size=0.0),
        image=image_config("maskrcnn_benchmark", "caffe", MEAN),
        legacy_boxes=True,
    )  # fmt: skip
    return Plan(
        "the authors' Double-Head R-CNN" if double else "maskrcnn-benchmark's Faster R-CNN",
        config,
        num_classes=classes,
        rules=agnostic_rules(rules) if agnostic else rules,
        unneeded=UNNEEDED,
        guessed=guessed,
        cells=read_cells(tensors),
    )


def count_all_classes(tensors: Mapping[str, Tensor], double: bool) -> int:
    """The number of classes; the two predictors of a Double-Head must agree."""
    names = [("cls_score", "bbox_pred"), ("cls_score_fc", "bbox_pred_fc")] if double else [("cls_score", "bbox_pred")]
    counts = {
        count_classes(tensors, f"{PREDICTOR}.{classifier}", f"{PREDICTOR}.{regressor}", True, AGNOSTIC_ROWS)
        for classifier, regressor in names
    }
    if len(counts) > 1:
        raise ConversionError(f"'{PREDICTOR}.cls_score' and 'cls_score_fc' disagree on the classes: {sorted(counts)}")
    return counts.pop()


def read_stacks(tensors: Mapping[str, Tensor]) -> tuple[int, bool]:
    """The number of stacks of (non-local block, bottleneck) after the first block, and whether the former exist.

    Raises:
        ConversionError: a stack has no bottleneck or no batch norm.
    """
    prefix = f"{STACKS}."
    numbers = {name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)}
    for number in sorted(numbers):
        parts = {name.removeprefix(f"{prefix}{number}.") for name in tensors if name.startswith(f"{prefix}{number}.")}
        if not any(part.startswith("ffconv.") for part in parts):
            raise ConversionError(f"{prefix}{number} has no bottleneck, which is not supported (NONLOCAL_USE_FFCONV)")
        if "g.weight" in parts and "W.bn.weight" not in parts:
            raise ConversionError(f"{prefix}{number} has no batch norm, which is not supported (NONLOCAL_USE_BN)")
    return len(numbers), any(f"{prefix}{number}.g.weight" in tensors for number in numbers)


def stack_rules(stacks: int, attention: bool) -> list[Rule]:
    """The rules for the stacks, which follow the first block of the tower."""
    rules = []
    for stack in range(stacks):
        source, index = f"{STACKS}.{stack}", 1 + stack * (1 + attention)
        if attention:
            block = f"{CONV_TOWER}.{index}"
            rules += [Rule(f"{source}.{layer}.*", f"{block}.{layer}.*") for layer in ("theta", "phi", "g")]
            rules += [Rule(f"{source}.W.0.*", f"{block}.out.*"), Rule(f"{source}.W.bn.*", f"{block}.norm.*")]
        rules.append(Rule(f"{source}.ffconv.bottleneck.*.*", f"{CONV_TOWER}.{index + attention}.residual.*.*"))
    return rules


def read_cells(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The cell anchors of every level, with this library's box ends: one pixel further than the source's."""
    names = sorted(
        (name for name in tensors if name.startswith(f"{CELLS}.")), key=lambda name: int(name.rpartition(".")[2])
    )
    return {name: tensors[name] + torch.tensor([0, 0, 1, 1]) for name in names}


PROJECT = Project(
    "maskrcnn_benchmark",
    ("backbone.body.stem.**", "backbone.fpn.fpn_inner*.**", "roi_heads.box.**", "rpn.head.cls_tower.**"),
    plan,
)
