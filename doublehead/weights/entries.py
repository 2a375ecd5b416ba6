"""Finds the weights among the entries of a training checkpoint, and restores the model's own names for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import refusal
from .pickles import Refused, WeightsError, shown
from .values import TensorReader, kind_of
from .wrappers import COUNTERS, WRAPPERS, without_wrappers

STATE_KEYS = ("model", "state_dict", "model_state_dict", "model_state", "weights")
"""The entries in which training checkpoints keep the weights: `model` in Detectron2 and maskrcnn-benchmark,
`state_dict` in MMDetection, Lightning and timm."""
AVERAGED_KEYS = ("model_ema", "ema_state_dict", "state_dict_ema", "ema_model", "ema")
"""The entries for averaged weights, which are used only if there are no others."""
OUTER = {"model": "a trainer's module, such as Lightning's"}
"""Prefixes that are removed only if all names have them -> their origin."""
LONGEST_NAME = 1000


@dataclass
class State:
    """The weights in a file, and its other entries."""

    tensors: dict[str, Tensor]
    """The weights under the model's own names, without wrappers' prefixes; float16 and bfloat16 become float32."""
    others: dict[str, Any] = field(default_factory=dict)
    """The other entries of the file."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Tensors that a wrapper added -> their meaning."""
    notes: list[str] = field(default_factory=list)
    """Remarks for the user."""


def take_state(path: str | Path, content: Any) -> State:
    """The weights in `content`, the result of `read_file`: all of it, or the entry in which trainers keep them.

    Raises:
        WeightsError: there are no weights, or other values are among them.
    """
    path = Path(path)
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds {kind_of(content)}, not a dictionary of weights")
    state, found, notes = content, State({}), []
    while (key := _state_key(state)) is not None:
        found.others |= {shown(name): value for name, value in state.items() if name != key}
        if key in AVERAGED_KEYS:
            notes.append(f"the weights are the entry {key!r}: an average, as there are no others")
        state = state[key]
    tensors = _read_all(path, state)
    if not tensors:
        raise WeightsError(f"{path}: no tensors in it (entries: {some(map(shown, content)) or 'none'})")
    found.tensors, found.dropped, more = unwrapped(tensors)
    found.notes = notes + more
    return found


def _state_key(content: Mapping[str, Any]) -> str | None:
    return next((key for key in (*STATE_KEYS, *AVERAGED_KEYS) if isinstance(content.get(key), Mapping)), None)


def _read_all(path: Path, state: Mapping[str, Any]) -> dict[str, Tensor]:
    reader, tensors = TensorReader(path), {}
    for name, value in state.items():
        name = shown(name)
        if len(name) > LONGEST_NAME or name in tensors:
            raise refusal(path, Refused(f"has two tensors, or one of a very long name, called {name[:60]!r}"))
        tensor = reader.read(name, value)
        if tensor is None:
            raise WeightsError(
                f"{path}: {name!r} is {kind_of(value)}, where a state_dict has tensors; the weights are looked for in "
                f"the entries {', '.join(map(repr, STATE_KEYS))}, else in the whole file"
            )
        tensors[name] = tensor.to(torch.float32) if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
    return tensors


def unwrapped(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """The tensors without wrappers' parts in their names, the tensors that wrappers added, and remarks on both.

    Wrappers may be nested in any order ("module._orig_mod.") and occur inside a name ("backbone._orig_mod.").
    """
    found, notes = dict(tensors), []
    dropped = {
        name: COUNTERS[name.rpartition(".")[2]]
        for name in found
        if name.rpartition(".")[2] in COUNTERS and found[name].dim() == 0
    }
    found = {name: tensor for name, tensor in found.items() if name not in dropped}
    while (part := _outer_part(found)) is not None:
        found = {name.removeprefix(f"{part}."): tensor for name, tensor in found.items()}
        notes.append(f"dropped the prefix '{part}.' of every name ({(WRAPPERS | OUTER)[part]})")
    inner = {name: without_wrappers(name) for name in found}
    if len(set(inner.values())) == len(inner) and "" not in inner.values():
        used = sorted({part for name in found for part in name.split(".") if part in WRAPPERS})
        notes += [f"dropped '{part}.' within names ({WRAPPERS[part]})" for part in used]
        found = {inner[name]: tensor for name, tensor in found.items()}
    return found, dropped, notes


def _outer_part(tensors: Mapping[str, Tensor]) -> str | None:
    parts = {name.partition(".")[0] for name in tensors}
    part = parts.pop() if len(parts) == 1 else None
    whole = any("." not in name for name in tensors)  # its name would become empty
    return part if part is not None and (part in WRAPPERS or part in OUTER) and not whole else None


def some(names: Iterable[str], most: int = 5) -> str:
    """The first names, for a message."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name[:80] for name in names[:most]) + more
