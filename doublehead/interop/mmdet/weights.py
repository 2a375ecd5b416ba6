"""MMDetection's Faster R-CNN and Double-Head R-CNN (2.x and 3.x), and the box branch of its Mask R-CNN.

A checkpoint's notes hold the class names and the configuration as text; where they are missing, the default
configuration is taken ("pytorch" style: RGB, stride in the 3x3 convolutions).  The Double-Head's first block has no
ReLU on its shortcut.
"""

from __future__ import annotations

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
from ..shapes import (
    agnostic_rules,
    background_first,
    count_classes,
    find_resnet,
    is_class_agnostic,
    pooled_side,
    shape_of,
    with_background_box,
)
from ..styles import ANY_WIDTH, image_config
from .configuration import Configuration, class_names, read_configuration

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
    Unneeded("ema_*", "an additional average of the weights"),
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
    """The plan for converting an MMDetection model."""
    tensors = checkpoint.tensors
    refuse(FOREIGN, tensors, ACCEPTED)
    backbone = find_resnet(tensors, [f"backbone.layer{stage}." for stage in (1, 2, 3, 4)])
    channels = shape_of(tensors, "neck.lateral_convs.0.conv.weight", 4)[0]
    double = any(name.startswith(f"{HEAD}.res_block.") for name in tensors)
    first = f"{HEAD}.fc_branch.0.weight" if double else f"{HEAD}.shared_fcs.0.weight"
    fc_dim, columns = shape_of(tensors, first, 2)
    classes = count_classes(tensors, f"{HEAD}.fc_cls", f"{HEAD}.fc_reg", background_regressed=False, agnostic_rows=4)
    agnostic = is_class_agnostic(tensors, f"{HEAD}.fc_reg", classes, agnostic_rows=4)
    options = {"non_local": NonLocalConfig(enabled=False), "class_agnostic_boxes": agnostic}
    if double:
        prefix = f"{HEAD}.conv_branch."
        blocks = len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})
        width = shape_of(tensors, f"{HEAD}.res_block.conv2.conv.weight", 4)[0]
        rules = (*COMMON_RULES, *DOUBLE_RULES, *bottleneck_rules(blocks))
        head = HeadConfig("double_head", fc_dim, width, blocks + 1, shortcut_relu=False, **options)
        loss = LossConfig(w_fc=2.0, w_conv=2.0)
    else:
        rules = (*COMMON_RULES, *FASTER_RULES)
        head = HeadConfig("fc", fc_dim, **options)
        loss = LossConfig(w_fc=1.0, w_conv=1.0, smooth_l1_beta=0.0)
    found = read_configuration(checkpoint.meta)
    if style and found.style and style != found.style:
        raise ConversionError(f"--style {style}: the configuration in the checkpoint says {found.style}")
    default = RPNConfig()
    config = ModelConfig(
        backbone=BackboneConfig(
            backbone, weights=None, fpn_channels=channels,
            stride_in_1x1=(style or found.style) == "caffe" and backbone != "resnet18",
        ),
        rpn=RPNConfig(
            found.anchor_sizes or default.anchor_sizes, found.aspect_ratios or default.aspect_ratios, "exact",
            min_size=ANY_WIDTH, smooth_l1_beta=0.0,
        ),
        roi=RoIConfig(
            output_size=pooled_side(columns, channels, first), sampling_ratio=0, aligned=True, level_rule="mmdet",
            conv_box_scale=found.conv_box_scale or 1.3,
        ),
        head=head,
        loss=loss,
        detection=DetectionConfig(min_size=0.0),
        image=image_config(
            "mmdet", style or found.style or "pytorch", found.mean, found.std, found.channel_order, found.image_scale
        ),
    )  # fmt: skip
    mask = any(name.startswith("roi_head.mask_head.") for name in tensors)
    kind = "Double-Head R-CNN" if double else "Mask R-CNN (its box branch)" if mask else "Faster R-CNN"
    rules = agnostic_rules(rules) if agnostic else rules
    return Plan(
        f"MMDetection's {kind}", config, classes, rules, UNNEEDED, classes=class_names(checkpoint.meta),
        guessed=guessed(found, style, double),
    )  # fmt: skip


def guessed(found: Configuration, style: str | None, double: bool) -> dict[str, str]:
    """Fields that the checkpoint does not state -> where their values come from."""
    of_style = "--style" if style else "as MMDetection's default; another: --style caffe"
    sources = {
        "backbone.stride_in_1x1": (found.style, of_style),
        "image.channel_order": (found.channel_order, of_style),
        "image.mean": (found.mean, of_style),
        "image.min_size": (found.image_scale, "MMDetection's default"),
        "rpn.anchor_sizes": (found.anchor_sizes, "MMDetection's default"),
    }
    if double:
        sources["roi.conv_box_scale"] = (found.conv_box_scale, "MMDetection's default")
    return {field: reason for field, (value, reason) in sources.items() if value is None}


def bottleneck_rules(blocks: int) -> list[Rule]:
    """The rules for the conv branch's bottlenecks, which follow the first block of the tower."""
    return [
        Rule(f"{HEAD}.conv_branch.{block}.{source}{layer}.*", f"{CONV_TOWER}.{block + 1}.residual.{index}.*")
        for block in range(blocks)
        for layer in (1, 2, 3)
        for source, index in (("conv", 3 * layer - 3), ("bn", 3 * layer - 2))
    ]


PROJECT = Project(
    "mmdet",
    ("neck.**", "rpn_head.**", "roi_head.**", "bbox_head.**"),
    plan,
)
