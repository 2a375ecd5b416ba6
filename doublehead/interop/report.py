"""The report of a conversion, for the user."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import Recipe
from .formats import Converted
from .loading import Checkpoint

CONVENTIONS = (
    "image.channel_order", "image.mean", "image.std", "image.resize", "image.min_size", "image.max_size",
    "backbone.name", "backbone.stride_in_1x1", "backbone.norm", "backbone.norm_eps",
    "rpn.anchors", "rpn.anchor_sizes", "rpn.aspect_ratios", "rpn.min_size",
    "rpn.pre_nms_test", "rpn.post_nms_test", "rpn.nms_iou",
    "roi.level_rule", "roi.aligned", "roi.sampling_ratio", "roi.output_size", "roi.box_weights",
    "head.kind", "head.fc_dim", "head.class_agnostic_boxes",
    "detection.score_threshold", "detection.nms_iou", "detection.max_detections", "detection.min_size",
    "legacy_boxes",
)  # fmt: skip
"""Fields of the model that describe the source's conventions."""
CONVENTIONS_OF_CONV_HEADS = ("roi.conv_box_scale", "head.conv_dim", "head.conv_blocks", "head.shortcut_relu")
CONVENTIONS_OF_NON_LOCAL = ("head.non_local.pairwise", "head.non_local.groups", "head.non_local.scale",
                            "head.non_local.relu_after", "head.non_local.inner_dim")  # fmt: skip
CONVENTIONS_OF_EXT = ("detection.readout", "detection.fusion")


def describe(checkpoint: Checkpoint, converted: Converted) -> str:
    """The report: the kind of model, the tensors that were left out and why, and the recipe's conventions."""
    return "\n".join(
        [
            f"{checkpoint.path}: {converted.plan.kind}, {len(converted.classes)} classes: {_some(converted.classes)}",
            *(f"  {note}" for note in checkpoint.notes),
            *_tensor_lines(checkpoint, converted),
            *_convention_lines(converted.recipe, converted.plan.guessed),
        ]
    )


def _tensor_lines(checkpoint: Checkpoint, converted: Converted) -> list[str]:
    mapped = converted.mapped
    lines = [f"{len(checkpoint.tensors)} tensors: {len(mapped.sources)} used, {len(mapped.unneeded)} left out"]
    for reason, names in _by_reason(mapped.unneeded).items():
        lines.append(f"  {len(names)} x {reason}: {_some(names)}")
    for reason, names in _by_reason(checkpoint.ignored).items():
        lines.append(f"  entry {', '.join(map(repr, names))} of the file: {reason}")
    return lines


def _convention_lines(recipe: Recipe, guessed: Mapping[str, str]) -> list[str]:
    fields = list(CONVENTIONS)
    head = recipe.model.head
    if head.kind.startswith("double"):
        fields += CONVENTIONS_OF_CONV_HEADS
        fields += CONVENTIONS_OF_NON_LOCAL if head.non_local.enabled else ()
    if head.kind == "double_head_ext":
        fields += CONVENTIONS_OF_EXT
    width = max(map(len, fields)) + len("model.")
    lines = ["conventions (another: --set FIELD=VALUE)"]
    for field in fields:
        reason = f"   <- the weights cannot tell: {guessed[field]}" if field in guessed else ""
        lines.append(f"  {'model.' + field:<{width}}  {_text(_get(recipe.model, field))}{reason}")
    return lines


def _by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        grouped.setdefault(reason, []).append(name)
    return grouped


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _get(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_text, value)) + "]"
    return f"{value:.6g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
