"""What the operators raise for wrong arguments, and the check they all share.

`nms`, `batched_nms`, `roi_align` and `MultiScaleRoIAlign` stand in for torchvision's, whose checks are RuntimeErrors
from C++, and for the shape of RoIs AssertionErrors.  Ours are both, Python's customary kind of error and torchvision's,
so that an `except` written for either catches them.
"""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor


class ArgumentValueError(ValueError, RuntimeError):
    """A shape, device or number that is not accepted."""


class ArgumentTypeError(TypeError, RuntimeError):
    """An argument of another type, or a tensor of another dtype, than is accepted."""


class AssertedValueError(ArgumentValueError, AssertionError):
    """Boxes to pool of another shape, which torchvision asserts."""


class AssertedTypeError(ArgumentTypeError, AssertedValueError):
    """Boxes to pool that are neither a tensor nor a list of tensors, which torchvision asserts too."""


def check_tensor(name: str, value: object, accepted: str, error: type[TypeError] = ArgumentTypeError) -> None:
    """Raises `error` unless `value` is a tensor; `accepted` says in words what is: "a Tensor[N, 4]"."""
    if not isinstance(value, Tensor):
        refuse(name, value, accepted, error)


def refuse(name: str, value: object, accepted: str, error: type[TypeError] = ArgumentTypeError) -> NoReturn:
    """Raises `error`; of a list or an array it also says how to convert it."""
    numbers = isinstance(value, (list, tuple)) or hasattr(value, "__array__")
    way_out = "; torch.as_tensor converts lists and arrays" if numbers and not isinstance(value, Tensor) else ""
    raise error(f"{name} must be {accepted}, got {type(value).__name__}{way_out}")
