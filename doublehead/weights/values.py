"""Turns the contents of a pickle into tensors and plain values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .arrays import NumpyArray
from .files import first_line, read_file, refusal
from .pickles import SCALARS, Inert, Placeholder, Refused, WeightsError, shown
from .tensors import DTYPES, LazyTensor, Unusable

MOST_COPIES = 16
"""Limit on the ratio of the tensors' total size to the file's length; tensors may share data."""
SLACK = 1 << 20
DEEPEST = 100
"""Limit on the depth of nested containers."""


class TensorReader:
    """Reads the tensors of one file, from no more data than the file has."""

    def __init__(self, path: Path) -> None:
        self._path, self._length = path, path.stat().st_size
        self._left, self._stored = MOST_COPIES * self._length + SLACK, 0
        self._storages: set[int] = set()
        self._seen: dict[int, Tensor] = {}

    def read(self, name: str, value: Any) -> Tensor | None:
        """`value` as a dense, real tensor on the CPU; None: it is not a tensor.

        Args:
            name: its name in the file, for messages.
            value: from `read_file`; it must live as long as this reader.

        Raises:
            WeightsError: its data are not in the file, or no model here has tensors of this kind.
        """
        if id(value) not in self._seen:  # an object may occur several times
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
            except Exception as error:  # shapes that PyTorch does not accept
                raise WeightsError(f"{self._path}: {name!r} is damaged ({first_line(error)})") from error
        if not isinstance(value, Tensor):
            return None
        if value.dtype not in DTYPES.values():
            raise WeightsError(f"{self._path}: {name!r} is of {value.dtype}, where plain numbers are accepted")
        return value.view(torch.uint8).ne(0) if value.dtype == torch.bool else value  # bytes may exceed 1


def read_plain(path: str | Path) -> Any:
    """Everything in a file, like `torch.load(weights_only=True)`: tensors and arrays as tensors on the CPU, with their
    dtypes and strides; dictionaries, lists, tuples, sets and plain values.  An OrderedDict becomes a dictionary.

    Tensors never share memory, even if they do in the file, so in-place training of one changes no other.

    Raises:
        WeightsError: see `read_file`; or the file holds other values.
    """
    path = Path(path)
    content, reader = read_file(path), TensorReader(path)
    left = MOST_COPIES * path.stat().st_size
    taken: set[int] = set()  # addresses of memory in use

    def plain(value: Any, name: str, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise refusal(path, Refused("has many times more values than bytes"))
        if depth > DEEPEST:
            raise refusal(path, Refused("nests its containers too deeply"))
        if isinstance(value, (dict, set, frozenset)) and any(isinstance(key, Placeholder) for key in value):
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
    """Whether the elements neither overlap nor leave gaps; only then does a copy have the same strides."""
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def kind_of(value: Any) -> str:
    """A short description of the kind of `value`."""
    known = ((NumpyArray, "a numpy array"), (LazyTensor, "a tensor"), (Unusable, "a tensor of another kind"),
             (Inert, "an object of a class that is dropped unread"))  # fmt: skip
    return next((text for kind, text in known if isinstance(value, kind)), f"a {type(value).__name__}")
