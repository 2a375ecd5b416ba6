"""PyTorch's tensors in a pickle: their positions in the file, from which they are read on demand."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .arrays import shape_of
from .pickles import Function, Inert, Placeholder, Refused, Unpickler

DTYPES = {
    name: getattr(torch, name)
    for name in ("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "float16",
                 "bfloat16", "float32", "float64")
}  # fmt: skip
"""The accepted dtypes."""
STORAGES = {
    "BoolStorage": "bool", "ByteStorage": "uint8", "CharStorage": "int8", "ShortStorage": "int16",
    "IntStorage": "int32", "LongStorage": "int64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32", "DoubleStorage": "float64",
}  # fmt: skip
OTHER_TYPES = (
    "complex32", "complex64", "complex128", "qint8", "qint32", "quint8", "quint4x2", "quint2x4", "float8_e4m3fn",
    "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2",
)  # fmt: skip
OTHER_STORAGES = (
    "ComplexFloatStorage", "ComplexDoubleStorage", "QInt8Storage", "QInt32Storage", "QUInt8Storage",
    "QUInt4x2Storage", "QUInt2x4Storage",
)  # fmt: skip
OTHER_TENSORS = {
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_qtensor": "a quantised tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor without data (on the device 'meta')",
    "_rebuild_wrapper_subclass": "a tensor of a class of its own",
    "_rebuild_device_tensor_from_numpy": "a tensor of another device's own format",
    "_rebuild_device_tensor_from_cpu_tensor": "a tensor of another device's own format",
}


class Unusable(Inert):
    """A tensor of a kind that no model here has; only its description is kept."""

    __slots__ = ("what",)

    def __init__(self, what: str) -> None:
        self.what = what


class StorageKind(Placeholder):
    """`torch.FloatStorage` and its like; `dtype` None: the type is not accepted."""

    __slots__ = ("dtype", "name")

    def __init__(self, name: str, dtype: torch.dtype | None) -> None:
        self.name, self.dtype = name, dtype


@dataclass
class Storage:
    """A tensor storage in a file."""

    path: Path
    kind: StorageKind
    number: int
    """The number of elements."""
    begin: int | None = None
    """The offset of the data in the file; None: not known yet."""
    swapped: bool = False
    """Whether the data have the other byte order."""
    crc: int = 0
    """The checksum of the bytes; 0: unknown."""
    bytes: Tensor | None = None
    """The bytes, once they have been read."""

    @property
    def size(self) -> int:
        """The length in bytes."""
        return self.number * self.kind.dtype.itemsize

    def read(self) -> Tensor:
        """The bytes, `Tensor[size]` uint8.

        Raises:
            Refused: the file does not have them, or they are damaged.
        """
        if self.bytes is None:
            if self.begin is None or self.begin + self.size > self.path.stat().st_size:
                raise Refused("has a tensor without data")
            found = torch.zeros(self.size, dtype=torch.uint8)
            with open(self.path, "rb") as file:
                file.seek(self.begin)
                if self.size and file.readinto(found.numpy()) != self.size:
                    raise Refused("ends within a tensor")
            if self.crc and zlib.crc32(found.numpy()) != self.crc:
                raise Refused("has a tensor whose bytes are not those that were written (CRC): a damaged copy")
            self.bytes = found
        return self.bytes


class LazyTensor(Placeholder):
    """A tensor's position in a storage."""

    __slots__ = ("dtype", "offset", "size", "storage", "stride")

    def __init__(self, storage: Storage, dtype: torch.dtype, offset: int, size: tuple, stride: tuple) -> None:
        self.storage, self.dtype, self.offset, self.size, self.stride = storage, dtype, offset, size, stride

    def build(self, state: Any) -> None:
        pass  # a tensor's attributes are not needed

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    def tensor(self) -> Tensor:
        """Read the tensor.

        Raises:
            Refused: the storage is too small, or its data are missing or damaged.
        """
        width = self.dtype.itemsize
        number = 1
        for size in self.size:
            number *= size
        if number == 0:
            return torch.zeros(self.size, dtype=self.dtype)
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))
        available = self.storage.size // width
        if last >= available or number > available:
            raise Refused(f"has a tensor of shape {self.size} in {available} numbers: more than there are")
        flat = self.storage.read()[: available * width]
        if self.storage.swapped and width > 1:
            flat = flat.view(-1, width).flip(1).reshape(-1)
        return flat.view(self.dtype).as_strided(self.size, self.stride, self.offset)


def _lazy_tensor(storage: Any, dtype: Any, offset: Any, size: Any, stride: Any, metadata: Any = None) -> Placeholder:
    if type(storage) is not Storage:
        raise Refused("has a tensor without a storage")
    if isinstance(dtype, Unusable):
        return dtype
    if storage.kind.dtype is None:
        return Unusable(f"a tensor in a {storage.kind.name}")
    if not isinstance(dtype, torch.dtype):
        raise Refused("has a tensor of no type")
    if metadata:
        return Unusable("a tensor that is conjugated or negated when it is read")
    size, stride = shape_of(size), shape_of(stride)
    if len(size) != len(stride) or type(offset) is not int or not 0 <= offset < 2**62:
        raise Refused("has a tensor with wrong strides")
    return LazyTensor(storage, dtype, offset, size, stride)


def _rebuild(unpickler: Unpickler, storage: Any, offset: Any, size: Any, stride: Any, grad: Any = False,
             hooks: Any = None, metadata: Any = None) -> Placeholder:  # fmt: skip
    """`_rebuild_tensor` and `_rebuild_tensor_v2`."""
    dtype = storage.kind.dtype if type(storage) is Storage else None
    return _lazy_tensor(storage, dtype, offset, size, stride, metadata)


def _rebuild_v3(unpickler: Unpickler, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any,
                dtype: Any, metadata: Any = None) -> Placeholder:  # fmt: skip
    return _lazy_tensor(storage, dtype, offset, size, stride, metadata)


def _parameter(unpickler: Unpickler, tensor: Any, *more: Any) -> Any:
    """`torch._utils._rebuild_parameter`: the parameter's tensor."""
    if not isinstance(tensor, (LazyTensor, Unusable)):
        raise Refused(f"makes a parameter of a {type(tensor).__name__}")
    return tensor


def _rebuild_from_type(unpickler: Unpickler, function: Any, kind: Any, arguments: Any, state: Any = None) -> Any:
    """`torch._tensor._rebuild_from_type_v2`: a tensor with attributes, which are dropped."""
    if type(arguments) is not tuple or function not in _REBUILDERS:
        raise Refused("makes a tensor in an unknown way")
    return function.call(unpickler, *arguments)


def _size(unpickler: Unpickler, sizes: Any = ()) -> tuple[int, ...]:
    return shape_of(sizes)


_UTILS = {
    **{name: Function(_rebuild) for name in ("_rebuild_tensor", "_rebuild_tensor_v2")},
    "_rebuild_tensor_v3": Function(_rebuild_v3),
    **{name: Function(_parameter) for name in ("_rebuild_parameter", "_rebuild_parameter_with_state")},
    **{name: Unusable(what) for name, what in OTHER_TENSORS.items()},
}
_REBUILDERS = list(_UTILS.values())
_PARAMETER = Function(_parameter)

NAMES: dict[tuple[str, str], Any] = {
    **{("torch._utils", name): function for name, function in _UTILS.items()},
    **{("torch", name): dtype for name, dtype in DTYPES.items()},
    **{("torch", name): Unusable(f"a tensor of type {name}") for name in OTHER_TYPES},
    **{(module, name): StorageKind(name, DTYPES[dtype]) for name, dtype in STORAGES.items()
       for module in ("torch", "torch.cuda")},
    **{("torch", name): StorageKind(name, None) for name in OTHER_STORAGES},
    ("torch.storage", "UntypedStorage"): StorageKind("UntypedStorage", torch.uint8),
    ("torch", "Size"): Function(_size),
    ("torch.nn.parameter", "Parameter"): _PARAMETER,
    ("torch._tensor", "Tensor"): _PARAMETER,
    ("torch", "Tensor"): _PARAMETER,
    ("torch._tensor", "_rebuild_from_type_v2"): Function(_rebuild_from_type),
}  # fmt: skip
