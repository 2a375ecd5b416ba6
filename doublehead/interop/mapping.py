"""Brings a foreign model's tensors under this library's names: tables of rules, and nothing left over.

Each project has a table `(source pattern -> target pattern, change)` and one of tensors that are not needed, with the
reason.  In a pattern `*` stands for one part of a dotted name and `**` for one or more; what they matched in the source
fills those of the target, in order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import UserError
from .loading import Checkpoint

COUNTER = "num_batches_tracked"
SHOWN = 8
"""How many names an error lists."""


class ConversionError(UserError):
    """The checkpoint cannot be converted; the message names the tensor or what kind of model it is."""


class Rule(NamedTuple):
    """Tensors to take over."""

    source: str
    target: str
    change: Callable[[Tensor], Tensor] | None = None
    """What is done to the tensor; None: nothing."""


class Unneeded(NamedTuple):
    """Tensors to leave out, and why."""

    source: str
    reason: str


class Foreign(NamedTuple):
    """A tensor that shows that the model is of a kind which cannot be converted."""

    source: str
    kind: str


@dataclass
class Plan:
    """How one checkpoint becomes a model of this library."""

    kind: str
    """What it was found to be, for people."""
    config: ModelConfig
    num_classes: int
    """With background."""
    rules: Sequence[Rule]
    unneeded: Sequence[Unneeded] = ()
    classes: Sequence[str] | None = None
    """Names, where the checkpoint has them."""
    guessed: dict[str, str] = field(default_factory=dict)
    """Field of `config`, dotted -> where its value is from, as the weights cannot tell it."""
    cells: dict[str, Tensor] = field(default_factory=dict)
    """Name of a source tensor -> anchors of a cell, `Tensor[A, 4]` of one level, that the model's must equal."""


class Mapped(NamedTuple):
    """The outcome of the rules."""

    tensors: dict[str, Tensor]
    """By this library's names."""
    sources: dict[str, str]
    """This library's name -> the source's."""
    unneeded: dict[str, str]
    """The source's name -> why it is left out."""


def refuse(kinds: Iterable[Foreign], names: Iterable[str], accepted: str) -> None:
    """Raise ConversionError if a name shows that the model is of another kind."""
    names = list(names)
    for pattern, kind in kinds:
        found = next((name for name in names if matches(pattern, name)), None)
        if found is not None:
            raise ConversionError(f"this is {kind} (it has {found!r}), which cannot be converted; accepted: {accepted}")


def map_tensors(tensors: Mapping[str, Tensor], rules: Sequence[Rule], unneeded: Sequence[Unneeded]) -> Mapped:
    """Leave out what is not needed, and apply the first rule that matches each of the other names.

    Raises:
        ConversionError: names that nothing matches, or two for one place.
    """
    mapped = Mapped({}, {}, {})
    unknown = []
    for name, tensor in tensors.items():
        reason = next((entry.reason for entry in unneeded if matches(entry.source, name)), None)
        target, change = _target_of(name, rules)
        if reason is not None:
            mapped.unneeded[name] = reason
        elif target is None:
            unknown.append(name)
        elif target in mapped.tensors:
            raise ConversionError(f"{name!r} and {mapped.sources[target]!r} are both for {target}")
        else:
            mapped.tensors[target] = tensor if change is None else change(tensor)
            mapped.sources[target] = name
    if unknown:
        raise ConversionError(f"tensors of unknown meaning: {_list(unknown)}; nothing may be left over")
    return mapped


def complete(
    wanted: Mapping[str, Tensor], mapped: Mapped, rules: Sequence[Rule], source: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The mapped tensors as the state of a model, which must want exactly these.

    Counters of batches may be missing: they start at 0, and matter to training alone.

    Args:
        wanted: the model's state; shapes and types are looked at, so that it may be on the device "meta".

    Raises:
        ConversionError: tensors missing, too many, of another shape or not finite, by the source's names.
    """
    tensors = dict(mapped.tensors)
    for name in wanted.keys() - tensors.keys():
        if name.endswith(COUNTER):
            tensors[name] = torch.zeros(wanted[name].shape, dtype=wanted[name].dtype)
    missing = [_source_of(name, rules) for name in wanted if name not in tensors]
    extra = [mapped.sources[name] for name in tensors if name not in wanted]
    shapes = [
        f"{mapped.sources[name]!r} has shape {tuple(source[mapped.sources[name]].shape)}, which gives "
        f"{tuple(tensor.shape)} where {tuple(wanted[name].shape)} is needed"
        for name, tensor in tensors.items()
        if name in wanted and tensor.shape != wanted[name].shape
    ]
    problems = [f"missing: {_list(missing)}"] if missing else []
    problems += [f"without a place in this model: {_list(extra)}"] if extra else []
    problems += [f"of wrong shape: {'; '.join(shapes[:SHOWN])}"] if shapes else []
    if not problems:
        broken = [mapped.sources[name] for name in mapped.tensors if not _sound(tensors[name], wanted[name])]
        problems += [f"NaN, infinity or whole numbers in place of weights: {_list(broken)}"] if broken else []
    if problems:
        raise ConversionError(f"the tensors do not make a whole model: {'. '.join(problems)}")
    return tensors


def check_cells(cells: Mapping[str, Tensor], model_cells: Tensor) -> None:
    """Compare the anchors that the checkpoint holds with the model's, `Tensor[levels, A, 4]`.

    Raises:
        ConversionError: they differ, so that the recipe needs other sizes.
    """
    if cells and len(cells) != len(model_cells):
        raise ConversionError(f"anchors of {len(cells)} levels in the checkpoint, of {len(model_cells)} in the recipe")
    for (name, found), expected in zip(cells.items(), model_cells, strict=len(cells) > 0):
        if found.shape != expected.shape or not torch.allclose(found.float(), expected, atol=1e-2):
            raise ConversionError(
                f"{name!r} has other anchors than the recipe: {found.tolist()}, not {expected.tolist()}; set their "
                "sizes and ratios: --set model.rpn.anchor_sizes=... model.rpn.aspect_ratios=..."
            )


def matches(pattern: str, name: str) -> bool:
    """Whether `name` is one that `pattern` stands for."""
    return _compiled(pattern).fullmatch(name) is not None


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\*\*|\*)", pattern)
    return re.compile("".join({"*": r"([^.]+)", "**": "(.+)"}.get(part, re.escape(part)) for part in parts))


def _translate(name: str, source: str, target: str) -> str | None:
    found = _compiled(source).fullmatch(name)
    if found is None:
        return None
    values = iter(found.groups())
    return re.sub(r"\*\*|\*", lambda _: next(values), target)


def _target_of(name: str, rules: Sequence[Rule]) -> tuple[str | None, Callable[[Tensor], Tensor] | None]:
    for rule in rules:
        target = _translate(name, rule.source, rule.target)
        if target is not None:
            return target, rule.change
    return None, None


def _source_of(target: str, rules: Sequence[Rule]) -> str:
    """What the source calls the tensor that would become `target`."""
    found = (_translate(target, rule.target, rule.source) for rule in rules)
    return next((name for name in found if name is not None), target)


def _sound(tensor: Tensor, wanted: Tensor) -> bool:
    """Whether `tensor` is of the kind of `wanted`, and finite in its type (float64 has larger numbers than float32)."""
    return tensor.is_floating_point() == wanted.is_floating_point() and bool(tensor.to(wanted.dtype).isfinite().all())


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


class Project(NamedTuple):
    """A foreign project: how its checkpoints are known, and how they are read."""

    name: str
    """What `--format` calls it."""
    signs: Sequence[str]
    """Patterns of names that only this project's models have."""
    plan: Callable[[Checkpoint, str | None], Plan]
    """From a checkpoint and a backbone's style (`caffe`, `pytorch`, None) to the plan; raises ConversionError."""
