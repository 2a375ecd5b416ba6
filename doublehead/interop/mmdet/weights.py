"""MMDetection's Faster R-CNN and Double-Head R-CNN (2.x and 3.x), and the box branch of its Mask R-CNN.

A checkpoint's notes hold the class names and the configuration as text; where they are missing, the default
configuration is taken ("pytorch" style: RGB, stride in the 3x3 convolutions).  The Double-Head's first block has no
ReLU on its shortcut.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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
from ..mapping import COUNTER, ConversionError, Foreign, Plan, Project, Rule, Unneeded, refuse
from ..names import BODY, CONV, CONV_TOWER, DELTAS, FC, FC1, FC2, LATERAL, OBJECTNESS, OUTPUT, RPN_CONV
from ..shapes import background_first, count_classes, find_resnet, pooled_side, shape_of, with_background_box
from ..styles import ANY_WIDTH, image_config

ACCEPTED = "Faster R-CNN and Double-Head R-CNN with a pyramid on ResNet-18, -50 or -101, the box branch of Mask R-CNN"
HEAD = "roi_head.bbox_head"
COMMON_RULES = (
    Rule("backbone.**", f"{BODY}.**"),
    Rule("neck.lateral_convs.*.conv.*", f"{LATERAL}.*.0.*"),
    Rule("neck.fpn_convs.*.conv.*", f"{OUTPUT}.*.0.*"),
    Rule("rpn_head.rpn_conv.*", f"{RPN_CONV}.*"),
    Rule("rpn_head.rpn_cls.*", f"{OBJECTNESS}.*"),
    Rule("rpn_head.rpn_reg.*", f"{DELTAS}.*"),
    Rule(f"{HEAD}.fc_cls.*", f"{FC}.classifier.*", background_first),
)
FASTER_RULES = (
    Rule(f"{HEAD}.shared_fcs.0.*", f"{FC1}.*"),
    Rule(f"{HEAD}.shared_fcs.1.*", f"{FC2}.*"),
    Rule(f"{HEAD}.fc_reg.*", f"{FC}.regressor.*", with_background_box),
)
WIDENING = f"{CONV_TOWER}.0"
DOUBLE_RULES = (
    Rule(f"{HEAD}.fc_branch.0.*", f"{FC1}.*"),
    Rule(f"{HEAD}.fc_branch.1.*", f"{FC2}.*"),
    Rule(f"{HEAD}.fc_reg.*", f"{CONV}.regressor.*", with_background_box),
    Rule(f"{HEAD}.res_block.conv1.conv.*", f"{WIDENING}.residual.0.*"),
    Rule(f"{HEAD}.res_block.conv1.bn.*", f"{WIDENING}.residual.1.*"),
    Rule(f"{HEAD}.res_block.conv2.conv.*", f"{WIDENING}.residual.3.*"),
    Rule(f"{HEAD}.res_block.conv2.bn.*", f"{WIDENING}.residual.4.*"),
    Rule(f"{HEAD}.res_block.conv_identity.conv.*", f"{WIDENING}.shortcut.0.*"),
    Rule(f"{HEAD}.res_block.conv_identity.bn.*", f"{WIDENING}.shortcut.1.*"),
)
UNNEEDED = (
    Unneeded(f"backbone.**.{COUNTER}", "counts batches in training; frozen norms have none"),
    Unneeded("roi_head.mask_head.**", "the mask branch"),
    Unneeded("data_preprocessor.*", "normalisation, which the recipe has"),
    Unneeded("ema_*", "an average of the weights beside the weights"),
)
FOREIGN = (
    Foreign("bbox_head.retina_cls.*", "a RetinaNet of MMDetection"),
    Foreign(f"{HEAD}.0.**", "a Cascade R-CNN of MMDetection"),
    Foreign("roi_head.shared_head.**", "a Faster R-CNN of MMDetection without a pyramid (C4)"),
    Foreign("bbox_head.shared_fcs.**", "a Faster R-CNN of MMDetection 1.x, which had other conventions"),
    Foreign("bbox_head.fc_branch.**", "a Double-Head R-CNN of MMDetection 1.x, which had other conventions"),
    Foreign("bbox_head.**", "a one-stage or transformer detector of MMDetection"),
    Foreign(f"{HEAD}.shared_convs.**", "an MMDetection model whose box head has shared convolutions"),
    Foreign(f"{HEAD}.shared_fcs.2.*", "an MMDetection model with more than two shared layers"),
    Foreign(f"{HEAD}.fc_branch.2.*", "an MMDetection Double-Head with more than two fc layers"),
    Foreign("backbone.layer*.*.conv2.conv_offset.*", "an MMDetection model with deformable convolutions"),
    Foreign("backbone.stem.**", "an MMDetection model on a ResNet with a deep stem (V1c, V1d)"),
    Foreign("backbone.layer*.*.gn*.*", "an MMDetection model with group normalisation"),
)


def plan(checkpoint: Checkpoint, style: str | None) -> Plan:
    """How an MMDetection model is converted."""
    tensors = checkpoint.tensors
    refuse(FOREIGN, tensors, ACCEPTED)
    backbone = find_resnet(tensors, [f"backbone.layer{stage}." for stage in (1, 2, 3, 4)])
    channels = shape_of(tensors, "neck.lateral_convs.0.conv.weight", 4)[0]
    double = any(name.startswith(f"{HEAD}.res_block.") for name in tensors)
    first = f"{HEAD}.fc_branch.0.weight" if double else f"{HEAD}.shared_fcs.0.weight"
    fc_dim, columns = shape_of(tensors, first, 2)
    plain = NonLocalConfig(enabled=False)
    if double:
        prefix = f"{HEAD}.conv_branch."
        blocks = len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})
        width = shape_of(tensors, f"{HEAD}.res_block.conv2.conv.weight", 4)[0]
        rules = (*COMMON_RULES, *DOUBLE_RULES, *bottleneck_rules(blocks))
        head = HeadConfig("double_head", fc_dim, width, blocks + 1, shortcut_relu=False, non_local=plain)
        loss = LossConfig(w_fc=2.0, w_conv=2.0)
    else:
        rules = (*COMMON_RULES, *FASTER_RULES)
        head = HeadConfig("fc", fc_dim, non_local=plain)
        loss = LossConfig(w_fc=1.0, w_conv=1.0, smooth_l1_beta=0.0)
    found = read_configuration(checkpoint.meta)
    if style and found.style and style != found.style:
        raise ConversionError(f"--style {style}: the configuration in the checkpoint says {found.style}")
    guessed = {"image.min_size": "MMDetection's default", "rpn.anchor_sizes": "MMDetection's default"}
    if double:
        guessed["roi.conv_box_scale"] = "MMDetection's default"
    if found.style is None:
        reason = "--style" if style else "as MMDetection's default configuration; another: --style caffe"
        guessed["backbone.stride_in_1x1"] = reason
        guessed |= dict.fromkeys(("image.channel_order", "image.mean"), reason) if found.mean is None else {}
    style = style or found.style or "pytorch"
    config = ModelConfig(
        backbone=BackboneConfig(
            backbone, weights=None, fpn_channels=channels, stride_in_1x1=style == "caffe" and backbone != "resnet18"
        ),
        rpn=RPNConfig(anchors="exact", min_size=ANY_WIDTH, smooth_l1_beta=0.0),
        roi=RoIConfig(
            output_size=pooled_side(columns, channels, first), sampling_ratio=0, aligned=True, level_rule="mmdet",
            conv_box_scale=1.3,
        ),
        head=head,
        loss=loss,
        detection=DetectionConfig(min_size=0.0),
        image=image_config("mmdet", style, found.mean, found.std, found.channel_order),
    )  # fmt: skip
    mask = any(name.startswith("roi_head.mask_head.") for name in tensors)
    kind = "Double-Head R-CNN" if double else "Mask R-CNN (its box branch)" if mask else "Faster R-CNN"
    classes = count_classes(tensors, f"{HEAD}.fc_cls", f"{HEAD}.fc_reg", background_regressed=False)
    return Plan(
        f"MMDetection's {kind}", config, classes, rules, UNNEEDED, classes=class_names(checkpoint.meta), guessed=guessed
    )


def bottleneck_rules(blocks: int) -> list[Rule]:
    """Of the conv branch's bottlenecks, which follow the first block of the tower."""
    return [
        Rule(f"{HEAD}.conv_branch.{block}.{source}{layer}.*", f"{CONV_TOWER}.{block + 1}.residual.{place}.*")
        for block in range(blocks)
        for layer in (1, 2, 3)
        for source, place in (("conv", 3 * layer - 3), ("bn", 3 * layer - 2))
    ]


class Configuration(NamedTuple):
    """What the text of a configuration says of the conventions; None: nothing."""

    style: str | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    channel_order: str | None = None


def read_configuration(meta: Mapping[str, Any]) -> Configuration:
    """Look for the backbone's style and the normalisation in the configuration that a checkpoint's notes hold."""
    text = next((meta[key] for key in ("cfg", "config") if isinstance(meta.get(key), str)), "")
    style = re.search(r"""style=["'](caffe|pytorch)["']""", text)
    to_rgb = re.search(r"\b(?:bgr_to_rgb|to_rgb)=(True|False)", text)
    mean, std = (re.search(rf"\b{name}=(\[[^\]]*\])", text, re.DOTALL) for name in ("mean", "std"))
    if not (mean and std and to_rgb):
        return Configuration(style[1] if style else None)
    order = "rgb" if to_rgb[1] == "True" else "bgr"
    return Configuration(style[1] if style else None, *(_numbers(found[1]) for found in (mean, std)), order)


def class_names(meta: Mapping[str, Any]) -> list[str] | None:
    """The class names in a checkpoint's notes (3.x: `dataset_meta`, 2.x: `CLASSES`); None: there are none."""
    notes = meta.get("dataset_meta")
    places = [notes, meta] if isinstance(notes, Mapping) else [meta]
    found = next((place[key] for place in places for key in ("classes", "CLASSES") if place.get(key)), None)
    if isinstance(found, str):
        return [found]
    return [str(name) for name in found] if isinstance(found, Sequence) else None


def _numbers(text: str) -> list[float]:
    values = ast.literal_eval(text)
    if len(values) != 3 or not all(isinstance(value, (int, float)) for value in values):
        raise ConversionError(f"the configuration in the checkpoint normalises with {text}, not with three numbers")
    return [float(value) for value in values]


PROJECT = Project(
    "mmdet",
    ("neck.**", "rpn_head.**", "roi_head.**", "bbox_head.**"),
    plan,
)
