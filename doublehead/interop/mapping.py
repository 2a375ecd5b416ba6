"""Renames a foreign model's tensors to this library's names by a table of rules; no tensor may be left over.

Each project has a table `(source pattern -> target pattern, change)`, and another of tensors that are not needed, with
the reason.  In a pattern `*` matches one part of a dotted name and `**` one or more; the matched parts replace the
wildcards of the target, in order.
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
"""The number of names that an error message lists."""


class ConversionError(UserError):
    """The checkpoint cannot be converted; the message names the tensor or the kind of model."""


class Rule(NamedTuple):
    """Tensors to copy."""

    source: str
    target: str
    change: Callable[[Tensor], Tensor] | None = None
    """A function applied to the tensor; None: the tensor is copied as it is."""


class Unneeded(NamedTuple):
    """Tensors to leave out, and why."""

    source: str
    reason: str


class Foreign(NamedTuple):
    """A tensor that identifies a kind of model which cannot be converted."""

    source: str
    kind: str


@dataclass
class Plan:
    """How one checkpoint becomes a model of this library."""

    kind: str
    """The kind of model, as shown to the user."""
    config: ModelConfig
    num_classes: int
    """The number of classes, with background."""
    rules: Sequence[Rule]
    unneeded: Sequence[Unneeded] = ()
    classes: Sequence[str] | None = None
    """The class names, where the checkpoint has them."""
    guessed: dict[str, str] = field(default_factory=dict)
    """Dotted field of `config` that the weights do not determine -> where its value comes from."""
    cells: dict[str, Tensor] = field(default_factory=dict)
    """Name of a source tensor -> the cell anchors of one level, `Tensor[A, 4]`, which the model's must equal."""


class Mapped(NamedTuple):
    """The result of applying the rules."""

    tensors: dict[str, Tensor]
    """The tensors, under this library's names."""
    sources: dict[str, str]
    """This library's name -> the source's."""
    unneeded: dict[str, str]
    """The source's name -> why it is left out."""


def refuse(kinds: Iterable[Foreign], names: Iterable[str], accepted: str) -> None:
    """Raise ConversionError if a name identifies one of these kinds."""
    names = list(names)
    for pattern, kind in kinds:
        found = next((name for name in names if matches(pattern, name)), None)
        if found is not None:
            raise ConversionError(f"this is {kind} (it has {found!r}), which cannot be converted; accepted: {accepted}")


def map_tensors(tensors: Mapping[str, Tensor], rules: Sequence[Rule], unneeded: Sequence[Unneeded]) -> Mapped:
    """Leave out tensors that are not needed, and apply the first matching rule to each of the others.

    Raises:
        ConversionError: a name that no rule matches, or two tensors with the same target.
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
    """The mapped tensors as the state_dict of a model; they must be exactly the ones it needs.

    Batch counters may be missing: they start at 0, and only matter in training.

    Args:
        wanted: the model's state_dict; only shapes and dtypes are used, so it may be on the device "meta".

    Raises:
        ConversionError: tensors are missing, superfluous, not finite or have the wrong shape; by the source's names.
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
        broken = [mapped.sources[name] for name in mapped.tensors if not _is_valid(tensors[name], wanted[name])]
        problems += [f"NaN, infinity or whole numbers in place of weights: {_list(broken)}"] if broken else []
    if problems:
        raise ConversionError(f"the tensors do not make a whole model: {'. '.join(problems)}")
    return tensors


def check_cells(cells: Mapping[str, Tensor], model_cells: Tensor) -> None:
    """Compare the anchors in the checkpoint with the model's, `Tensor[levels, A, 4]`.

    Raises:
        ConversionError: they differ: the recipe needs other sizes or aspect ratios.
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
    """Whether `pattern` matches `name`."""
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
    """The source's name for the tensor that would become `target`."""
    found = (_translate(target, rule.target, rule.source) for rule in rules)
    return next((name for name in found if name is not None), target)


def _is_valid(tensor: Tensor, wanted: Tensor) -> bool:
    """Whether both are floating point or neither is, and `tensor` is finite after a cast to the dtype of `wanted`."""
    return tensor.is_floating_point() == wanted.is_floating_point() and bool(tensor.to(wanted.dtype).isfinite().all())


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


class Project(NamedTuple):
    """A foreign project: how its checkpoints are recognised and converted."""

    name: str
    """The name for `--format`."""
    signs: Sequence[str]
    """Patterns of tensor names that only this project's models have."""
    plan: Callable[[Checkpoint, str | None], Plan]
    """Makes the plan from a checkpoint and a backbone style (`caffe`, `pytorch`, None); raises ConversionError."""
