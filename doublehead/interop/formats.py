"""Finds the project a checkpoint comes from, and builds the corresponding model of this library."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..config import Recipe
from .classes import data_of, name_classes
from .detectron2 import weights as _detectron2
from .loading import Checkpoint
from .mapping import ConversionError, Mapped, Plan, Project, check_cells, complete, map_tensors, matches
from .maskrcnn_benchmark import weights as _maskrcnn_benchmark
from .mmdet import weights as _mmdet
from .settings import with_settings
from .torchvision import weights as _torchvision

PROJECTS: dict[str, Project] = {
    module.PROJECT.name: module.PROJECT for module in (_torchvision, _detectron2, _mmdet, _maskrcnn_benchmark)
}


class Converted(NamedTuple):
    """A foreign checkpoint as a model of this library, and how it was converted."""

    model: nn.Module
    """The model in eval mode, with the checkpoint's weights, in float32."""
    recipe: Recipe
    classes: list[str]
    """Label i is `classes[i - 1]`."""
    category_ids: list[int]
    project: str
    plan: Plan
    mapped: Mapped


def convert(
    checkpoint: Checkpoint,
    *,
    project: str | None = None,
    style: str | None = None,
    classes: Sequence[str] | None = None,
    settings: Sequence[str] = (),
) -> Converted:
    """Rebuild the model of a foreign checkpoint.

    Args:
        checkpoint: the result of `read_checkpoint`.
        project: one of `PROJECTS`; None: recognised by the tensors' names.
        style: the backbone's style, `caffe` (BGR, stride in the 1x1 convolutions) or `pytorch`; None: the one the
            checkpoint states, otherwise the project's usual one.
        classes: names, without background; None: the checkpoint's, otherwise those of COCO or Pascal VOC, chosen by
            the number of classes.
        settings: changes to the recipe, such as "model.backbone.norm_eps=1e-5".

    Raises:
        ConversionError: the kind of model is unknown or unsupported, tensors are missing, unknown or have the wrong
            shape, or an argument does not match the checkpoint; the message names them.
    """
    source = find_project(checkpoint, project)
    plan = source.plan(checkpoint, style)
    names, ids = name_classes(plan.num_classes - 1, classes if classes is not None else plan.classes)
    about = f"{plan.kind}, converted from {checkpoint.path.name}; training fields are this library's defaults"
    recipe = Recipe(_name(source, plan), about, plan.config, data_of(names))
    recipe = with_settings(recipe, settings)
    for setting in settings:
        plan.guessed.pop(setting.partition("=")[0].removeprefix("model."), None)
    mapped = map_tensors(checkpoint.tensors, plan.rules, plan.unneeded)
    with torch.device("meta"):  # no memory for a model whose size the file only claims
        outline = _build(recipe, plan).state_dict()
    state = complete(outline, mapped, plan.rules, checkpoint.tensors)
    model = _build(recipe, plan)
    model.load_state_dict(state)
    check_cells(plan.cells, model.detector.rpn.anchors.cells)
    return Converted(model.eval(), recipe, names, ids, source.name, plan, mapped)


def find_project(checkpoint: Checkpoint, name: str | None) -> Project:
    """The project called `name`; None: the one whose name patterns match the most tensors.

    Raises:
        ConversionError: there is none.
    """
    if name is not None:
        if name not in PROJECTS:
            raise ConversionError(f"--format {name!r}: expected one of {', '.join(PROJECTS)}")
        return PROJECTS[name]
    counts = {
        project: sum(any(matches(sign, tensor) for sign in PROJECTS[project].signs) for tensor in checkpoint.tensors)
        for project in PROJECTS
    }
    best = max(counts, key=counts.get)
    if counts[best]:
        return PROJECTS[best]
    if {"conv1.weight", "layer1.0.conv1.weight"} <= checkpoint.tensors.keys():
        raise ConversionError("a ResNet alone, not a detector: a training starts from it with --model.backbone.weights")
    names = ", ".join(list(checkpoint.tensors)[:5])
    raise ConversionError(
        f"not a detector of a known project (its tensors begin with {names}); known are {', '.join(PROJECTS)}"
    )


def _name(source: Project, plan: Plan) -> str:
    """The recipe's name, such as "mmdet-double-head-r50-fpn"."""
    kind = {"fc": "faster-rcnn"}.get(plan.config.head.kind, plan.config.head.kind)
    return f"{source.name}-{kind}-{plan.config.backbone.name.replace('resnet', 'r')}-fpn".replace("_", "-")


def _build(recipe: Recipe, plan: Plan) -> nn.Module:
    from ..models import build_detector

    backbone = dataclasses.replace(recipe.model.backbone, weights=None)
    try:
        return build_detector(dataclasses.replace(recipe.model, backbone=backbone), plan.num_classes)
    except ValueError as error:
        raise ConversionError(f"the recipe cannot be built: {error}") from error
