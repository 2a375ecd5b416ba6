"""What the operators raise for wrong arguments, and the checks that they share.

A check names the argument, what is expected of it, and what it got.  Most operators raise Python's ValueError and
TypeError.  `nms`, `batched_nms`, `roi_align` and `MultiScaleRoIAlign` stand in for torchvision's, whose checks are
RuntimeErrors from C++, and for the shape of RoIs AssertionErrors.  Theirs are both, Python's customary kind of error
and torchvision's, so that an `except` written for either catches them; they pass the kind as `error`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

import torch
from torch import Tensor

from ._dtypes import FLOATS

# ---------------------------------------------------------------------------------------------
# Errors


class ArgumentValueError(ValueError, RuntimeError):
    """A shape, device or number that is not accepted."""


class ArgumentTypeError(TypeError, RuntimeError):
    """An argument of another type, or a tensor of another dtype, than is accepted."""


class AssertedValueError(ArgumentValueError, AssertionError):
    """Boxes to pool of another shape, which torchvision asserts."""


class AssertedTypeError(ArgumentTypeError, AssertedValueError):
    """Boxes to pool that are neither a tensor nor a list of tensors, which torchvision asserts too."""


# ---------------------------------------------------------------------------------------------
# Types


def check_tensor(name: str, value: object, accepted: str, error: type[TypeError] = ArgumentTypeError) -> None:
    """Raises `error` unless `value` is a tensor; `accepted` says in words what is: "a Tensor[N, 4]"."""
    if not isinstance(value, Tensor):
        refuse(name, value, accepted, error)


def refuse(name: str, value: object, accepted: str, error: type[TypeError] = ArgumentTypeError) -> NoReturn:
    """Raises `error`; for a list or an array the message also says how to convert it."""
    numbers = isinstance(value, (list, tuple)) or hasattr(value, "__array__")
    way_out = "; torch.as_tensor converts lists and arrays" if numbers and not isinstance(value, Tensor) else ""
    raise error(f"{name} must be {accepted}, got {type(value).__name__}{way_out}")


# ---------------------------------------------------------------------------------------------
# Dtypes


def check_float(name: str, tensor: Tensor, error: type[TypeError] = TypeError) -> None:
    """Raises `error` unless the tensor's dtype is one of `FLOATS`."""
    if tensor.dtype not in FLOATS:
        raise error(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")


def check_same_dtype(name: str, tensor: Tensor, of: str, like: Tensor) -> None:
    """Raises a TypeError unless the tensor has the dtype of `like`, the argument called `of`."""
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype of {of}, {like.dtype}, got {tensor.dtype}")


# ---------------------------------------------------------------------------------------------
# Shapes and devices


def check_shape(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    letters: str = "",
    like: str = "",
    error: type[ValueError] = ValueError,
) -> None:
    """Raises `error` unless the tensor has this shape.

    Args:
        name: the argument's name.
        tensor: its value.
        shape: the shape expected.
        letters: the same in letters: "[B, R, 4]".
        like: the argument whose shape decided on it.
        error: the kind.
    """
    if tensor.shape != shape:
        expected = f"{letters} = {list(shape)}" if letters else f"{list(shape)}"
        raise error(f"{name} must have shape {expected}{like and f' like {like}'}, got {list(tensor.shape)}")


def check_same_device(
    name: str, tensor: Tensor, of: str, like: Tensor, error: type[ValueError] = ValueError
) -> None:  # fmt: skip
    """Raises `error` unless the tensor is on the device of `like`, the argument called `of`."""
    if tensor.device != like.device:
        raise error(f"{name} must be on the device of {of}, {like.device}, got {tensor.device}")


def check_count(count: Tensor | None) -> None:
    """Raises a ValueError unless `count`, the number of RoIs that are computed, is a `Tensor[]` of int64 or None."""
    if count is not None and (count.dim() != 0 or count.dtype != torch.int64):
        raise ValueError(f"count must be a Tensor[] of int64, got {list(count.shape)} {count.dtype}")


# ---------------------------------------------------------------------------------------------
# Options


def check_choice(
    name: str, value: object, choices: Iterable[str], error: type[ValueError] = ValueError
) -> None:  # fmt: skip
    """Raises `error` unless `value` is one of `choices`."""
    if value not in choices:
        raise error(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_not_negative(name: str, number: int, error: type[ValueError] = ValueError) -> None:
    """Raises `error` unless the number is at least 0."""
    if number < 0:
        raise error(f"{name} must be >= 0, got {number}")
