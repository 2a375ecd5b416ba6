"""The weights among what a training left in a file, under the names that the model itself gives them."""

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
"""Where training checkpoints keep the weights: Detectron2, maskrcnn-benchmark `model`, MMDetection, Lightning and timm
`state_dict`."""
AVERAGED_KEYS = ("model_ema", "ema_state_dict", "state_dict_ema", "ema_model", "ema")
"""Where some keep an average of them; taken only where there is nothing else."""
OUTER = {"model": "a trainer's module, such as Lightning's"}
"""Parts that only count in front of all names."""
LONGEST_NAME = 1000


@dataclass
class State:
    """The weights of a file, and what was beside them."""

    tensors: dict[str, Tensor]
    """By their names in the model, without what wrappers put in front; float16 and bfloat16 as float32."""
    beside: dict[str, Any] = field(default_factory=dict)
    """Other entries of the file."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Tensors that a wrapper added -> what they are."""
    notes: list[str] = field(default_factory=list)
    """What was noticed, for people."""


def take_state(path: str | Path, content: Any) -> State:
    """The weights in `content`, which `read_file` gave: the whole of it, or the entry where trainers put them.

    Raises:
        WeightsError: there are none, or something else is among them.
    """
    path = Path(path)
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds {kind_of(content)}, not a dictionary of weights")
    state, found, notes = content, State({}), []
    while (key := _state_key(state)) is not None:
        found.beside |= {shown(name): value for name, value in state.items() if name != key}
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
    """Tensors without what wrappers put into their names, the tensors that wrappers added, and notes on both.

    Wrappers may be stacked in any order ("module._orig_mod.") and stand inside a name ("backbone._orig_mod.").
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
    whole = any("." not in name for name in tensors)  # nothing would be left of it
    return part if part is not None and (part in WRAPPERS or part in OUTER) and not whole else None


def some(names: Iterable[str], most: int = 5) -> str:
    """The first of the names, for a message."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name[:80] for name in names[:most]) + more
