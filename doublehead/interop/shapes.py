"""Infers a model's ResNet, number of classes and layer widths from its tensors' names and shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .mapping import ConversionError, Rule

RESNETS = {
    (False, (2, 2, 2, 2)): "resnet18",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
}
"""(whether its blocks are bottlenecks, number of blocks in each of the four stages) -> name."""


def find_resnet(tensors: Mapping[str, Tensor], stages: Sequence[str]) -> str:
    """The name of the ResNet, recognised by its blocks.

    Args:
        stages: the prefixes of the four stages' tensors, such as "backbone.layer1.".

    Raises:
        ConversionError: another backbone.
    """
    blocks = [
        {name.removeprefix(stage).split(".")[0] for name in tensors if name.startswith(stage)} for stage in stages
    ]
    counts = tuple(map(len, blocks))
    if 0 in counts:
        raise ConversionError(f"the backbone is not a ResNet with a pyramid: no tensor {stages[counts.index(0)]}*")
    first = f"{stages[0]}0."
    bottleneck = f"{first}conv3.weight" in tensors
    second = tensors.get(f"{first}conv2.weight")
    if second is not None and second.dim() == 4 and second.shape[1] != second.shape[0]:
        raise ConversionError(f"the backbone is a ResNeXt ({first}conv2.weight has {tuple(second.shape)}: groups); "
                              f"accepted: {', '.join(RESNETS.values())}")  # fmt: skip
    found = RESNETS.get((bottleneck, counts))
    if found is None:
        kind = "bottlenecks" if bottleneck else "basic blocks"
        raise ConversionError(f"the backbone is a ResNet with {counts} {kind}; accepted: {', '.join(RESNETS.values())}")
    return found


def shape_of(tensors: Mapping[str, Tensor], name: str, dims: int) -> tuple[int, ...]:
    """The shape of a tensor from which a layer width is read.

    Raises:
        ConversionError: it is missing or does not have `dims` dimensions.
    """
    if name not in tensors:
        raise ConversionError(f"the tensors do not make a whole model: missing: {name}")
    shape = tuple(tensors[name].shape)
    if len(shape) != dims or 0 in shape:
        raise ConversionError(f"{name!r} has shape {shape}, where one of {dims} dimensions is needed")
    return shape


def count_classes(
    tensors: Mapping[str, Tensor],
    classifier: str,
    regressor: str,
    background_regressed: bool,
    agnostic_rows: int | None = None,
) -> int:
    """The number of classes, with background.

    Args:
        classifier, regressor: names of the layers.
        background_regressed: whether the regressor has rows for the background.
        agnostic_rows: the number of rows of a class-agnostic regressor; None: this project has none.

    Raises:
        ConversionError: too few classes, or a regressor whose number of rows does not match.
    """
    classes = shape_of(tensors, f"{classifier}.weight", 2)[0]
    rows = shape_of(tensors, f"{regressor}.weight", 2)[0]
    if classes < 2:
        raise ConversionError(f"'{classifier}.weight' has {classes} rows: no class besides the background")
    expected = 4 * (classes if background_regressed else classes - 1)
    if rows not in (expected, agnostic_rows):
        agnostic = ", as a class-agnostic regressor has" if rows in (4, 8) else ""
        raise ConversionError(
            f"'{regressor}.weight' has {rows} rows{agnostic}; accepted: 4 for each of the classes that "
            f"'{classifier}.weight' has, {expected}"
        )
    return classes


def is_class_agnostic(tensors: Mapping[str, Tensor], regressor: str, classes: int, agnostic_rows: int) -> bool:
    """Whether the regressor has `agnostic_rows` rows for more than one class (`classes` includes the background)."""
    return classes > 2 and shape_of(tensors, f"{regressor}.weight", 2)[0] == agnostic_rows


def agnostic_rules(rules: Sequence[Rule]) -> list[Rule]:
    """The rules for a model with a class-agnostic regressor: its last box is copied as it is."""
    return [rule._replace(change=last_box) if rule.target.endswith(".regressor.*") else rule for rule in rules]


def last_box(rows: Tensor) -> Tensor:
    """The last four rows of a class-agnostic regressor; further rows belong to the background."""
    return rows[-4:].clone()


def pooled_side(columns: int, channels: int, name: str) -> int:
    """The side of the pooled map that an fc layer with this many input columns takes.

    Raises:
        ConversionError: no square map has this many values.
    """
    side = round((columns / channels) ** 0.5)
    if side < 1 or side * side * channels != columns:
        raise ConversionError(f"{name!r} has {columns} columns, which do not form a square map of {channels} channels")
    return side


def background_first(rows: Tensor) -> Tensor:
    """A classifier's rows with the background, which is last here, moved to the front."""
    return torch.cat((rows[-1:], rows[:-1]))


def with_background_box(rows: Tensor) -> Tensor:
    """A regressor's rows with four rows of zeros for the background put in front; they are never read."""
    return torch.cat((torch.zeros_like(rows[:4]), rows))
