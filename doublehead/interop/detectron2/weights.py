"""Converts Detectron2's Faster R-CNN with a pyramid, and the box branch of its Mask and Keypoint R-CNN.

Its published models (.pkl) start from Caffe2's ResNets: BGR images, stride in the 1x1 convolutions ("caffe").  Models
on torchvision's ResNets take RGB images and have the stride in the 3x3 convolutions ("pytorch").
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
from ..mapping import COUNTER, ConversionError, Foreign, Plan, Project, Rule, Unneeded, refuse
from ..names import BODY, DELTAS, FC, FC1, FC2, LATERAL, OBJECTNESS, OUTPUT, RPN_CONV
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

ACCEPTED = "Faster R-CNN with a pyramid on ResNet-50 or -101, and the box branch of Mask and Keypoint R-CNN"
BOTTOM = "backbone.bottom_up"
CELLS = "proposal_generator.anchor_generator.cell_anchors"
RULES = (
    Rule(f"{BOTTOM}.stem.conv1.weight", f"{BODY}.conv1.weight"),
    Rule(f"{BOTTOM}.stem.conv1.norm.*", f"{BODY}.bn1.*"),
    *(
        Rule(f"{BOTTOM}.res{stage + 1}.*.{source}.*", f"{BODY}.layer{stage}.*.{target}.*")
        for stage in (1, 2, 3, 4)
        for source, target in [
            ("shortcut.norm", "downsample.1"),
            ("shortcut", "downsample.0"),
            *((f"conv{layer}.norm", f"bn{layer}") for layer in (1, 2, 3)),
            *((f"conv{layer}", f"conv{layer}") for layer in (1, 2, 3)),
        ]
    ),
    *(Rule(f"backbone.fpn_lateral{level + 2}.*", f"{LATERAL}.{level}.0.*") for level in range(4)),
    *(Rule(f"backbone.fpn_output{level + 2}.*", f"{OUTPUT}.{level}.0.*") for level in range(4)),
    Rule("proposal_generator.rpn_head.conv.*", f"{RPN_CONV}.*"),
    Rule("proposal_generator.rpn_head.objectness_logits.*", f"{OBJECTNESS}.*"),
    Rule("proposal_generator.rpn_head.anchor_deltas.*", f"{DELTAS}.*"),
    Rule("roi_heads.box_head.fc1.*", f"{FC1}.*"),
    Rule("roi_heads.box_head.fc2.*", f"{FC2}.*"),
    Rule("roi_heads.box_predictor.cls_score.*", f"{FC}.classifier.*", background_first),
    Rule("roi_heads.box_predictor.bbox_pred.*", f"{FC}.regressor.*", with_background_box),
)
UNNEEDED = (
    Unneeded("roi_heads.mask_head.**", "the mask branch"),
    Unneeded("roi_heads.keypoint_head.**", "the keypoint branch"),
    Unneeded(f"{CELLS}.*", "anchors, which the recipe makes (compared)"),
    Unneeded("pixel_mean", "normalisation, which the recipe has (taken from here)"),
    Unneeded("pixel_std", "normalisation, which the recipe has (taken from here)"),
    Unneeded(f"**.{COUNTER}", "counts batches in training; frozen norms have none"),
)
FOREIGN = (
    Foreign("roi_heads.box_predictor.0.**", "a Cascade R-CNN of Detectron2"),
    Foreign("roi_heads.box_head.0.**", "a Cascade R-CNN of Detectron2"),
    Foreign("head.cls_subnet.**", "a RetinaNet of Detectron2"),
    Foreign("roi_heads.res5.**", "a Faster R-CNN of Detectron2 without a pyramid (C4)"),
    Foreign("backbone.res2.**", "a Faster R-CNN of Detectron2 without a pyramid (C4 or DC5)"),
    Foreign("sem_seg_head.**", "a panoptic or semantic model of Detectron2"),
    Foreign("roi_heads.box_head.conv1.**", "a Detectron2 model whose box head has convolutions"),
    Foreign(f"{BOTTOM}.res*.*.conv2_offset.*", "a Detectron2 model with deformable convolutions"),
)


def plan(checkpoint: Checkpoint, style: str | None) -> Plan:
    """The plan for converting a Detectron2 model."""
    tensors = checkpoint.tensors
    refuse(FOREIGN, tensors, ACCEPTED)
    backbone = find_resnet(tensors, [f"{BOTTOM}.res{stage}." for stage in (2, 3, 4, 5)])
    channels = shape_of(tensors, "backbone.fpn_lateral2.weight", 4)[0]
    fc_dim, columns = shape_of(tensors, "roi_heads.box_head.fc1.weight", 2)
    regressor = "roi_heads.box_predictor.bbox_pred"
    classes = count_classes(tensors, "roi_heads.box_predictor.cls_score", regressor, False, agnostic_rows=4)
    agnostic = is_class_agnostic(tensors, regressor, classes, agnostic_rows=4)
    guessed = {"image.min_size": "Detectron2's default"}
    buffers = [tensors[name] for name in ("pixel_mean", "pixel_std") if name in tensors]
    pixels = [[round(value, 4) for value in buffer.flatten().tolist()] for buffer in buffers]
    said = None
    if len(pixels) == 2:  # blue has the smallest mean
        said = "caffe" if pixels[0][0] < pixels[0][-1] else "pytorch"
    if style and said and style != said:
        raise ConversionError(f"--style {style}: the checkpoint's pixel_mean and pixel_std are those of style {said}")
    if not said:
        reason = "--style" if style else "as Detectron2's published models; another: --style pytorch"
        guessed |= dict.fromkeys(("image.channel_order", "image.mean", "backbone.stride_in_1x1"), reason)
    style = style or said or "caffe"
    sizes, ratios, cells = read_cells(tensors)
    config = ModelConfig(
        backbone=BackboneConfig(
            backbone, weights=None, fpn_channels=channels, stride_in_1x1=style == "caffe" and backbone != "resnet18"
        ),
        rpn=RPNConfig(sizes, ratios, "exact", min_size=ANY_WIDTH, smooth_l1_beta=0.0),
        roi=RoIConfig(
            output_size=pooled_side(columns, channels, "roi_heads.box_head.fc1.weight"),
            sampling_ratio=0, aligned=True, level_rule="detectron2",
        ),
        head=HeadConfig(
            "fc", fc_dim=fc_dim, non_local=NonLocalConfig(enabled=False), class_agnostic_boxes=agnostic
        ),
        loss=LossConfig(w_fc=1.0, w_conv=1.0, smooth_l1_beta=0.0),
        detection=DetectionConfig(min_size=ANY_WIDTH),
        image=image_config("detectron2", style, *pixels),
    )  # fmt: skip
    branch = next((name for name in ("mask", "keypoint") if any(f".{name}_head." in key for key in tensors)), None)
    kind = f"{branch.title()} R-CNN (its box branch)" if branch else "Faster R-CNN"
    names = ["person"] if branch == "keypoint" and classes == 2 else None
    rules = agnostic_rules(RULES) if agnostic else RULES
    return Plan(f"Detectron2's {kind}", config, classes, rules, UNNEEDED, names, guessed, cells)


def read_cells(tensors: Mapping[str, Tensor]) -> tuple[tuple[float, ...], tuple[float, ...], dict[str, Tensor]]:
    """Anchor sizes, aspect ratios and cell anchors from the checkpoint; where it has none, Detectron2's defaults.

    Raises:
        ConversionError: several sizes on one level, or aspect ratios that differ between levels.
    """
    names = sorted(
        (name for name in tensors if name.startswith(f"{CELLS}.")), key=lambda name: int(name.rpartition(".")[2])
    )
    default = RPNConfig()
    if not names:
        return default.anchor_sizes, default.aspect_ratios, {}
    cells = {name: tensors[name].double() for name in names}
    sizes, ratios = [], set()
    for name, corners in cells.items():
        sides = corners[:, 2:] - corners[:, :2]
        areas = sides.prod(1).sqrt()
        if not torch.allclose(areas, areas[:1], rtol=1e-4):
            raise ConversionError(f"{name!r} has anchors of several sizes on a level; accepted: one size a level")
        sizes.append(round(areas.mean().item(), 3))
        ratios.add(tuple((sides[:, 1] / sides[:, 0]).mul(1e4).round().div(1e4).tolist()))
    if len(ratios) > 1:
        raise ConversionError(f"{CELLS}: other aspect ratios on each level; accepted: the same on all")
    return tuple(sizes), ratios.pop(), cells


PROJECT = Project(
    "detectron2",
    (f"{BOTTOM}.**", "proposal_generator.**", "backbone.stem.**", "backbone.res2.**", "roi_heads.box_head.fc1.*",
     "head.cls_subnet.**"),
    plan,
)  # fmt: skip
