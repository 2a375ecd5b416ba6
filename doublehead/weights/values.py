"""From what a pickle left to tensors and plain values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .arrays import NumpyArray
from .files import first_line, read_file, refusal
from .pickles import SCALARS, Inert, Refused, StandIn, WeightsError, shown
from .tensors import DTYPES, LazyTensor, Unusable

MOST_COPIES = 16
"""How much more data the tensors may seem than the file is long: they may share theirs, but not without end."""
SLACK = 1 << 20
DEEPEST = 100
"""How many containers may stand in each other."""


class TensorReader:
    """Reads the tensors of one file, of no more data than it has."""

    def __init__(self, path: Path) -> None:
        self._path, self._length = path, path.stat().st_size
        self._left, self._stored = MOST_COPIES * self._length + SLACK, 0
        self._storages: set[int] = set()
        self._seen: dict[int, Tensor] = {}

    def read(self, name: str, value: Any) -> Tensor | None:
        """`value` as a tensor, dense, real, on the CPU; None: it is none.

        Args:
            name: where it is in the file, for messages.
            value: from `read_file`; it must stay alive as long as this reader.

        Raises:
            WeightsError: its data are not in the file, or it is of a kind that no model here has.
        """
        if id(value) not in self._seen:  # the same object may be in many places
            tensor = self._convert(name, value)
            if tensor is None:
                return None
            self._seen[id(value)] = tensor
        tensor = self._seen[id(value)]
        self._left -= tensor.numel() * tensor.element_size()
        if self._left < 0:
            raise refusal(self._path, Refused("has tensors of many times the file's length"))
        return tensor

    def _convert(self, name: str, value: Any) -> Tensor | None:
        if isinstance(value, LazyTensor) and id(value.storage) not in self._storages:
            self._storages.add(id(value.storage))
            self._stored += value.storage.size
            if self._stored > self._length:
                raise refusal(self._path, Refused("has tensors that together are longer than the file"))
        if isinstance(value, Unusable):
            raise WeightsError(
                f"{self._path}: {name!r} is {value.what}, where dense tensors of real numbers are accepted"
            )
        if isinstance(value, (LazyTensor, NumpyArray)):
            try:
                value = value.tensor()
            except Refused as error:
                raise refusal(self._path, Refused(f"{name!r}: {error}")) from error
            except Exception as error:  # shapes that PyTorch does not take
                raise WeightsError(f"{self._path}: {name!r} is damaged ({first_line(error)})") from error
        if not isinstance(value, Tensor):
            return None
        if value.dtype not in DTYPES.values():
            raise WeightsError(f"{self._path}: {name!r} is of {value.dtype}, where plain numbers are accepted")
        return value.view(torch.uint8).ne(0) if value.dtype == torch.bool else value  # any byte may stand in the file


def read_plain(path: str | Path) -> Any:
    """Everything in a file, as `torch.load(weights_only=True)` gives it: tensors and arrays as tensors on the CPU, in
    their types and strides; dictionaries, lists, tuples, sets and plain values.  An OrderedDict is a dictionary.

    Every number of every tensor is in memory of its own: training in place changes that one alone, whatever the
    tensors share in the file.

    Raises:
        WeightsError: as `read_file`, or something else is in it.
    """
    path = Path(path)
    content, reader = read_file(path), TensorReader(path)
    left = MOST_COPIES * path.stat().st_size
    taken: set[int] = set()  # memory, by its address

    def plain(value: Any, name: str, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise refusal(path, Refused("has many times more values than bytes"))
        if depth > DEEPEST:
            raise refusal(path, Refused("has containers in containers without end"))
        if isinstance(value, (dict, set, frozenset)) and any(isinstance(key, StandIn) for key in value):
            raise WeightsError(f"{path}: {name!r} has a key that is neither text nor a number")
        if type(value) is dict:
            return {key: plain(item, f"{name}.{key}" if name else shown(key), depth + 1) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(plain(item, f"{name}.{i}", depth + 1) for i, item in enumerate(value))
        if type(value) in (*SCALARS, set, frozenset):
            return value
        tensor = reader.read(name, value)
        if tensor is None:
            raise WeightsError(f"{path}: {name!r} is {kind_of(value)}, where tensors and plain values are accepted")
        memory = tensor.untyped_storage().data_ptr()
        if memory in taken or not _is_dense(tensor):
            tensor = tensor.clone()
        taken.add(tensor.untyped_storage().data_ptr())
        return tensor

    return plain(content, "", 0)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements lie each in its own place and without gaps; only then a copy has the same strides."""
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def kind_of(value: Any) -> str:
    """What `value` is, in some words."""
    known = ((NumpyArray, "a numpy array"), (LazyTensor, "a tensor"), (Unusable, "a tensor of another kind"),
             (Inert, "an object of a class that is dropped unread"))  # fmt: skip
    return next((text for kind, text in known if isinstance(value, kind)), f"a {type(value).__name__}")
