"""Which heads have to be trained, so that every kind in every variant can be put together from them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from doublehead.config import HeadConfig, HeadKind, ModelConfig, Recipe, RoIConfig, TrainConfig
from doublehead.config.overrides import override
from doublehead.errors import UserError, config_errors
from doublehead.models.readout import BRANCHES, Branch, task_weights

BASE = "base"
"""The variant in which nothing is varied."""
KINDS: tuple[HeadKind, ...] = (
    "fc", "conv", "double_fc", "double_conv", "double_head_reverse", "double_head", "double_head_ext",
)  # fmt: skip
SINGLE = ("fc", "conv")
"""Kinds of one head: their losses weigh 1, as in PAPER Table 1."""
VARIED = ("model.head.", "model.roi.", "model.loss.", "train.")
FROZEN = ("model.head.kind", "model.head.fused", "train.steps", "train.epochs", "train.batch_size", "train.amp",
          "train.seed", "train.device", "train.horizontal_flip", "train.augment", "train.eval_every",
          "train.checkpoint_every", "train.log_every", "train.sync_batch_norm", "train.aspect_ratio_grouping",
          "train.channels_last")  # fmt: skip
"""Fields that a variant cannot change: all variants see the same images in the same steps."""


@dataclass(frozen=True)
class HeadSpec:
    """All that the training of one head depends on besides the seed; heads with equal specs are trained once."""

    branch: Branch
    weights: tuple[float, float]
    """Of the classification and of the box loss."""
    head: HeadConfig
    """Without effect: fields of the other tower, which have their defaults, and `kind`."""
    roi: RoIConfig
    """As `head`: the box scale of the other tower has its default."""
    beta: float
    """Of the smooth L1 loss."""
    train: TrainConfig

    @property
    def label(self) -> str:
        """Such as "conv: boxes"."""
        tasks = {(True, True): "both", (True, False): "classes", (False, True): "boxes"}
        return f"{self.branch.tower}: {tasks[self.branch.classifies, self.branch.regresses]}"


@dataclass(frozen=True)
class Member:
    """One kind in one variant: a detector that is put together from trained heads."""

    variant: str
    kind: HeadKind
    model: ModelConfig
    heads: dict[str, HeadSpec]
    """Branch name -> head."""


def parse_variant(text: str) -> dict[str, Any]:
    """`FIELD=VALUE[,FIELD=VALUE...]` -> full field name -> value, which is JSON or else text.

    Raises:
        UserError: no such form.
    """
    values: dict[str, Any] = {}
    for part in re.split(r",(?=[a-z_0-9.]+=)", text):
        name, equals, value = part.partition("=")
        if not equals or not name or not value:
            raise UserError(
                f"{text!r}: expected FIELD=VALUE or FIELD=VALUE,FIELD=VALUE, such as model.head.conv_blocks=5"
            )
        try:
            values[name.strip()] = json.loads(value)
        except ValueError:
            values[name.strip()] = value
    return values


def varied(recipe: Recipe, changes: Mapping[str, Any], option: str) -> Recipe:
    """`recipe` with fields of the heads, the RoIs, the losses or the optimiser changed.

    Args:
        changes: full field name -> value.
        option: where they were given, for messages.

    Raises:
        UserError: there is no such field, it does not accept the value, or it is frozen.
    """
    nested: dict[str, Any] = {}
    for name, value in changes.items():
        if not name.startswith(VARIED) or name.startswith(FROZEN):
            raise UserError(
                f"{option}: {name} cannot be varied: backbone, RPN and images are the same for all heads; fields of "
                "model.head, model.roi, model.loss and of the optimiser (train.lr, train.optimizer, ...) can"
            )
        *groups, last = name.split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
    with config_errors():
        return override(recipe, nested)[0]


def plan(
    recipe: Recipe,
    kinds: Sequence[HeadKind],
    variants: Mapping[str, Mapping[str, Any]],
    varied_kinds: Sequence[HeadKind],
) -> list[Member]:
    """Every kind of the base, and of each variant those of `varied_kinds` that differ from the base's.

    A variant that changes none of them, such as the base's own cell of a grid, has all: they cost no training.
    """
    members = [_member(BASE, kind, recipe) for kind in kinds]
    for name, changes in variants.items():
        changed = varied(recipe, changes, "--vary")
        of_variant = [_member(name, kind, changed) for kind in varied_kinds]
        differing = [member for member in of_variant if member.heads != _member(BASE, member.kind, recipe).heads]
        members += differing or of_variant
    return members


def distinct_heads(members: Sequence[Member]) -> list[HeadSpec]:
    """The heads to train, each once, in the order of their first use."""
    return list(dict.fromkeys(spec for member in members for spec in member.heads.values()))


def _member(variant: str, kind: HeadKind, recipe: Recipe) -> Member:
    model = replace(recipe.model, head=replace(recipe.model.head, kind=kind))
    if kind != "double_head_ext":  # which alone has other read-outs
        model = replace(model, detection=replace(model.detection, readout="fused"))
    if kind in SINGLE:
        model = replace(model, loss=replace(model.loss, w_fc=1.0, w_conv=1.0))
    weights = task_weights(kind, model.loss)
    heads = {name: _spec(branch, weights[name], model, recipe.train) for name, branch in BRANCHES[kind].items()}
    return Member(variant, kind, model, heads)


def _spec(branch: Branch, weights: tuple[float, float], model: ModelConfig, train: TrainConfig) -> HeadSpec:
    head, roi = replace(model.head, kind="fc"), model.roi
    if branch.tower == "fc":
        conv = HeadConfig()
        head = replace(
            head, conv_dim=conv.conv_dim, conv_blocks=conv.conv_blocks, shortcut_relu=conv.shortcut_relu,
            non_local=conv.non_local, recompute=conv.recompute,
        )  # fmt: skip
        roi = replace(roi, conv_box_scale=1.0)
    else:
        head, roi = replace(head, fc_dim=HeadConfig().fc_dim), replace(roi, fc_box_scale=1.0)
    own = (weights[0] * branch.classifies, weights[1] * branch.regresses)
    return HeadSpec(branch, own, head, roi, model.loss.smooth_l1_beta, train)
