"""Reads numpy's arrays and numbers from a pickle without numpy's own constructors, which would trust its strides.

Plain numbers with exactly as many bytes as the shape needs are accepted; structured types, objects, strings, dates and
views are refused.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .pickles import Function, Placeholder, Refused, Unpickler, brief

MODULES = ("numpy.core", "numpy._core")
"""The modules of the array constructors in numpy 1 and 2."""
MOST_DIMENSIONS = 32
_CODE = re.compile(r"[<>=|]?(b1|i1|i2|i4|i8|u1|u2|u4|u8|f2|f4|f8|\?)")


class NumpyDtype(Placeholder):
    """`numpy.dtype` of plain numbers."""

    __slots__ = ("numpy",)

    def __init__(self, unpickler: Unpickler, code: Any, align: Any = False, copy: Any = False) -> None:
        if isinstance(code, bytes):
            code = code.decode("latin1")
        if type(code) is not str or not _CODE.fullmatch(code):
            raise Refused(f"has a numpy.dtype of {brief(code)}, where plain real numbers are accepted")
        self.numpy = np.dtype(code)

    def build(self, state: Any) -> None:
        """Take the state: (version, byte order, and fields that only structured types set)."""
        plain = (None, None, None, -1, -1, 0)
        if type(state) is not tuple or len(state) < 8 or state[2:8] != plain or any(state[8:]):
            raise Refused("has a structured numpy.dtype, where plain real numbers are accepted")
        order = state[1].decode("latin1") if type(state[1]) is bytes else state[1]
        if type(order) is not str or order not in ("<", ">", "=", "|"):
            raise Refused("has a numpy.dtype of an unknown byte order")
        if order != "|":
            self.numpy = self.numpy.newbyteorder(order)


class NumpyArray(Placeholder):
    """A numpy array: its bytes, dtype and shape."""

    __slots__ = ("data", "dtype", "shape", "order", "axes")

    def __init__(self, unpickler: Unpickler, kind: Any = None, shape: Any = None, code: Any = None) -> None:
        """`_reconstruct(numpy.ndarray, (0,), b"b")`: as numpy calls it, for an empty array that is filled later."""
        if kind is not NDARRAY or shape != (0,) or code not in (b"b", "b"):
            raise Refused("calls numpy._core.multiarray._reconstruct as numpy itself never does")
        self.data = None

    def build(self, state: Any) -> None:
        """Take the state: (version, shape, dtype, whether it is in Fortran order, data)."""
        if type(state) is not tuple or len(state) not in (4, 5) or self.data is not None:
            raise Refused("has a numpy array with an unknown state")
        shape, dtype, fortran, data = state[-4:]
        self.set(data, dtype, shape, "F" if fortran else "C")

    def set(self, data: Any, dtype: Any, shape: Any, order: str, axes: Any = None) -> None:
        """Set the contents.

        Raises:
            Refused: there are more or fewer bytes than the shape needs.
        """
        if type(dtype) is not NumpyDtype:
            raise Refused("has a numpy array without a type")
        shape = shape_of(shape)
        if type(data) not in (bytes, str):  # a string: written by Python 2
            raise Refused(f"has a numpy array whose data are a {type(data).__name__}")
        if len(data) != math.prod(shape) * dtype.numpy.itemsize:
            raise Refused(f"has a numpy array of shape {shape} and {dtype.numpy} with {len(data)} bytes of data")
        if axes is not None and not _are_axes(axes, len(shape)):
            raise Refused("has a numpy array with wrong axes")
        self.data, self.dtype, self.shape, self.order, self.axes = data, dtype.numpy, shape, order, axes

    def tensor(self) -> Tensor:
        """The array as a tensor with its own memory.

        Raises:
            Refused: it was never filled.
        """
        if self.data is None:
            raise Refused("has a numpy array without data")
        data = self.data.encode("latin1") if isinstance(self.data, str) else self.data
        array = np.frombuffer(data, self.dtype) if data else np.zeros(0, self.dtype)
        array = array.reshape(self.shape, order=self.order)
        if self.axes is not None:
            array = array.transpose(self.axes)
        native = array.astype(self.dtype.newbyteorder("="), order="C", copy=True)
        return torch.from_numpy(native).reshape(array.shape)


def _are_axes(axes: Any, number: int) -> bool:
    return (
        type(axes) is tuple
        and len(axes) == number
        and all(type(axis) is int for axis in axes)  # nested tuples may take exponential time to compare
        and sorted(axes) == list(range(number))
    )


def shape_of(value: Any) -> tuple[int, ...]:
    """`value` as the shape of an array.

    Raises:
        Refused: it is not a valid shape.
    """
    if type(value) is int:
        value = (value,)
    if type(value) not in (tuple, list) or len(value) > MOST_DIMENSIONS:
        raise Refused("has an array without a sensible shape")
    if any(type(size) is not int or not 0 <= size < 2**63 for size in value):
        raise Refused("has an array without a sensible shape")
    if math.prod(size for size in value if size) >= 2**62:
        raise Refused(f"has an array of shape {tuple(value)}")
    return tuple(value)


def _scalar(unpickler: Unpickler, dtype: Any, data: Any = None) -> NumpyArray:
    """A numpy scalar, as a zero-dimensional array."""
    found = NumpyArray(unpickler, NDARRAY, (0,), b"b")
    found.set(data, dtype, (), "C")
    return found


def _from_buffer(unpickler: Unpickler, data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> NumpyArray:
    """An array in the form of pickle protocol 5."""
    if order not in ("C", "F", "K") or (order == "K") != (axes is not None):
        raise Refused("has a numpy array in an unknown order")
    found = NumpyArray(unpickler, NDARRAY, (0,), b"b")
    found.set(data, dtype, shape, "F" if order == "F" else "C", axes)
    return found


class _NdArray(Placeholder):
    """The class `numpy.ndarray`, which a pickle may refer to but not call."""

    __slots__ = ()

    def call(self, unpickler: Unpickler, *arguments: Any) -> Any:
        raise Refused("calls numpy.ndarray as numpy itself never does")


NDARRAY = _NdArray()
NAMES: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): NDARRAY,
    ("numpy", "dtype"): Function(NumpyDtype),
    **{(f"{module}.multiarray", "_reconstruct"): Function(NumpyArray) for module in MODULES},
    **{(f"{module}.multiarray", "scalar"): Function(_scalar) for module in MODULES},
    **{(f"{module}.numeric", "_frombuffer"): Function(_from_buffer) for module in MODULES},
}
