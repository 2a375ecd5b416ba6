"""Reads checkpoints of other projects; nothing in a file is executed.

PyTorch's own files go through `torch.load(weights_only=True)`, plain pickles through an unpickler that knows the few
names listed here, safetensors through their library.  A file that names anything else is refused by that name.
"""

from __future__ import annotations

import codecs
import importlib
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine.errors import CheckpointError

STATE_KEYS = ("model", "state_dict", "model_state_dict", "model_state", "weights")
"""Where training checkpoints keep the weights: Detectron2, maskrcnn-benchmark `model`, MMDetection `state_dict`."""
ENTRY_REASONS = {
    "optimizer": "the optimizer's state",
    "scheduler": "the learning rate's schedule",
    "lr_scheduler": "the learning rate's schedule",
    "param_schedulers": "the learning rate's schedule",
    "message_hub": "logs of the training",
    "meta": "notes on the training (class names and conventions were looked for in them)",
    "iteration": "where the training stood",
    "epoch": "where the training stood",
    "__author__": "a note",
}
_LEGACY_TORCH = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
"""The number that the pickles of a file of torch.save before 1.6 begin with."""


@dataclass
class Checkpoint:
    """What was read."""

    path: Path
    tensors: dict[str, Tensor]
    """The weights, by the source's names."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """MMDetection's notes on the training."""
    ignored: dict[str, str] = field(default_factory=dict)
    """Entries of the file beside the weights -> why they are not needed."""
    notes: list[str] = field(default_factory=list)
    """What was noticed while reading."""


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read the weights of `path`: what torch.save, pickle.dump or safetensors wrote.

    The weights may be the whole file or the entry "model" or "state_dict" of it; a prefix "module." that all names have
    (DistributedDataParallel) is dropped.

    Raises:
        CheckpointError: no such file, truncated, no checkpoint, a pickle that names code, or no tensors in it; the
            message says which.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: a folder; give the checkpoint's file")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    return _take_weights(path, _read(path))


def _read(path: Path) -> Any:
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(b"PK") or _LEGACY_TORCH in head:
        return _read_torch(path)
    if len(head) > 8 and head[8:9] == b"{":  # the length of the header, then the header
        return _read_safetensors(path)
    if head[:1] == b"\x80" or head[:1] in b"(}]c" and head:
        return _read_pickle(path)
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: a pointer of Git LFS, not the file itself: fetch it with `git lfs pull`")
    if head.lstrip()[:1] == b"<":
        raise CheckpointError(f"{path}: a web page, not a checkpoint: the download went wrong")
    what = "an empty file" if not head else "not a file of torch.save, pickle or safetensors"
    raise CheckpointError(f"{path}: not a checkpoint ({what})")


def _read_torch(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_safe_for_torch()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged file raises nearly everything
        named = re.search(r"GLOBAL ([\w.]+)|_NamesCodeError: (.+)", str(error))
        if named or isinstance(error, _NamesCodeError):
            raise CheckpointError(_names_code(path, named[1] or named[2] if named else str(error))) from error
        raise CheckpointError(f"{path}: truncated or damaged ({_first_line(error)})") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("format", "").startswith("doublehead.model/"):
                raise CheckpointError(f"{path}: already a model of this library: evaluate and detect take it as it is")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: not a safetensors file, or truncated ({_first_line(error)})") from error


def _read_pickle(path: Path) -> Any:
    try:
        with open(path, "rb") as file:
            return _Unpickler(file, encoding="latin1").load()  # latin1: numpy arrays that Python 2 wrote
    except _NamesCodeError as error:
        raise CheckpointError(_names_code(path, str(error))) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle raises nearly everything
        raise CheckpointError(f"{path}: truncated or damaged, or not a pickle ({_first_line(error)})") from error


class _NamesCodeError(Exception):
    """A pickle names something that is not on the list."""


class HistoryBuffer:
    """Stands in for mmengine's class of that name (a training's logs), and does nothing."""

    def __setstate__(self, state: Any) -> None:
        pass


def _method(owner: Any, name: str) -> None:
    """Stands in for `getattr`, by which a HistoryBuffer names its own methods, and gives nothing."""
    if owner is not HistoryBuffer:
        raise _NamesCodeError(f"getattr(..., {name!r})")


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """`_codecs.encode`, by which pickles of protocol 2 write bytes, for that encoding alone."""
    if encoding != "latin1":
        raise _NamesCodeError(f"_codecs.encode({encoding!r})")
    return codecs.encode(text, "latin1")


class _Unpickler(pickle.Unpickler):
    """Knows dictionaries, and numpy's arrays and numbers."""

    def find_class(self, module: str, name: str) -> Any:
        found = _ALLOWED.get((module, name))
        if found is None:
            raise _NamesCodeError(f"{module}.{name}")
        return found


def _numpy_internals() -> dict[tuple[str, str], Any]:
    """numpy's own makers of arrays, under the names that numpy 1 and 2 give their modules."""
    found = {}
    for modern, old, name in [
        ("numpy._core.multiarray", "numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "numpy.core.multiarray", "scalar"),
        ("numpy._core.numeric", "numpy.core.numeric", "_frombuffer"),
    ]:
        try:
            maker = getattr(importlib.import_module(modern), name)
        except ModuleNotFoundError:  # numpy 1
            maker = getattr(importlib.import_module(old), name)
        found[modern, name] = found[old, name] = maker
    return found


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
    **_numpy_internals(),
}


def _safe_for_torch() -> list[Any]:
    """What `weights_only` may rebuild beside tensors and plain values: numpy's numbers, and logs that are dropped."""
    named = [(found, f"{module}.{name}") for (module, name), found in _ALLOWED.items() if module != "collections"]
    kinds = [type(np.dtype(code)) for code in ("?", "i1", "u1", "i2", "i4", "i8", "u8", "f2", "f4", "f8")]
    logs = [(HistoryBuffer, "mmengine.logging.history_buffer.HistoryBuffer"), (_method, "builtins.getattr")]
    return [*named, *kinds, *logs]


def _take_weights(path: Path, content: Any) -> Checkpoint:
    if isinstance(content, Mapping) and isinstance(content.get("blobs"), Mapping):
        raise CheckpointError(f"{path}: Caffe2 blobs of the first Detectron; Detectron2's and newer files are accepted")
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a dictionary of weights")
    key = next((key for key in STATE_KEYS if isinstance(content.get(key), Mapping)), None)
    if key is None:
        state, beside = content, {}
    else:
        state, beside = content[key], {name: value for name, value in content.items() if name != key}
    meta = beside.get("meta")
    checkpoint = Checkpoint(path, {}, meta if isinstance(meta, Mapping) else {})
    checkpoint.ignored = {str(name): ENTRY_REASONS.get(name, "not weights of the model") for name in beside}
    if beside.get("matching_heuristics"):
        raise CheckpointError(
            f"{path}: weights with Caffe2's names, which Detectron2 matches by guessing; save the model once in "
            "Detectron2 (DetectionCheckpointer.save) and convert that file"
        )
    for name, value in state.items():
        checkpoint.tensors[str(name)] = _as_tensor(path, str(name), value)
    if not checkpoint.tensors:
        raise CheckpointError(f"{path}: no tensors in it (entries: {', '.join(map(str, content)) or 'none'})")
    _drop_prefix(checkpoint)
    return checkpoint


def _as_tensor(path: Path, name: str, value: Any) -> Tensor:
    if isinstance(value, np.ndarray) and value.dtype != object:
        native = value.astype(value.dtype.newbyteorder("="), copy=False)
        value = torch.from_numpy(np.ascontiguousarray(native).copy()).reshape(value.shape)
    elif isinstance(value, (np.number, np.bool_)):
        value = torch.tensor(value.item())
    if not isinstance(value, Tensor):
        raise CheckpointError(
            f"{path}: {name!r} is a {type(value).__name__}, where a state_dict has tensors; entries 'model' and "
            f"'state_dict' were looked for"
        )
    return value.to(torch.float32) if value.dtype in (torch.float16, torch.bfloat16) else value


def _drop_prefix(checkpoint: Checkpoint) -> None:
    prefix = "module."
    if all(name.startswith(prefix) for name in checkpoint.tensors):
        checkpoint.tensors = {name.removeprefix(prefix): value for name, value in checkpoint.tensors.items()}
        checkpoint.notes.append(f"dropped the prefix {prefix!r} of every name (DistributedDataParallel)")


def _names_code(path: Path, name: str) -> str:
    return (
        f"{path}: names {name}, which is code and not weights; nothing of the file was executed. Save the weights "
        "alone where the file comes from: torch.save(model.state_dict(), ...)"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
