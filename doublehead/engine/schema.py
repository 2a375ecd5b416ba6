"""Checks of nested values from files: small checks that combine, and a one-line message about the first mismatch.

A check takes a value and its path in the file, such as `optimizer.state`, and raises `Mismatch` if it does not fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

Check = Callable[[Any, str], None]
_REAL = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)


class Mismatch(ValueError):
    """The message names the path, what was expected and what came."""


def wrong(path: str, value: Any, wanted: str) -> Mismatch:
    """The error for a `value` at `path` that is not as wanted."""
    return Mismatch(f"{path}: expected {wanted}, got {described(value)}")


def described(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        return f"a dictionary of {len(value)} entries" if value else "an empty dictionary"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, int) and abs(value) > 2**63:
        return "a huge number"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def whole(least: int = -(2**63)) -> Check:
    """A whole number of at least `least` that fits 64 bits."""

    def check(value: Any, path: str) -> None:
        if type(value) is not int or not least <= value < 2**63:
            raise wrong(path, value, "a whole number" + (f" of at least {least}" if least > -(2**63) else ""))

    return check


def number(least: float = -math.inf) -> Check:
    """A finite number of at least `least`."""

    def check(value: Any, path: str) -> None:
        fits = type(value) in (int, float) and abs(value) < 2**1000 and math.isfinite(value) and value >= least
        if not fits:
            raise wrong(path, value, "a finite number" + (f" of at least {least:g}" if least > -math.inf else ""))

    return check


def text(value: Any, path: str) -> None:
    """Text that is not empty."""
    if type(value) is not str or not value.strip():
        raise wrong(path, value, "text")


def anything(value: Any, path: str) -> None:
    """Any value."""


def either(first: Check, second: Check) -> Check:
    """What one of the two checks accepts; the message is the second's."""

    def check(value: Any, path: str) -> None:
        try:
            first(value, path)
        except Mismatch:
            second(value, path)

    return check


def exactly(expected: Any) -> Check:
    """This value, of the same type."""

    def check(value: Any, path: str) -> None:
        if type(value) is not type(expected) or value != expected:
            raise wrong(path, value, described(expected))

    return check


nothing = exactly(None)


def entries(wanted: Mapping[Any, Check], optional: Mapping[Any, Check] | None = None, others: bool = True) -> Check:
    """A dictionary with these entries; `others`: whether further ones are allowed."""

    def check(value: Any, path: str) -> None:
        if not isinstance(value, dict):
            raise wrong(path, value, "a dictionary")
        missing = [name for name in wanted if name not in value]
        if missing:
            raise Mismatch(f"{_joined(path, missing[0])} is missing{_more(missing)}")
        unknown = [name for name in value if name not in wanted and name not in (optional or {})]
        if unknown and not others:
            raise Mismatch(f"{_joined(path, unknown[0])} does not belong there{_more(unknown)}")
        for name, inner in {**wanted, **(optional or {})}.items():
            if name in value:
                inner(value[name], _joined(path, name))

    return check


def each(inner: Check, names: Check = text) -> Check:
    """A dictionary of any length whose names and values all pass one check."""

    def check(value: Any, path: str) -> None:
        if not isinstance(value, dict):
            raise wrong(path, value, "a dictionary")
        for name, content in value.items():
            names(name, f"a name in {path}")
            inner(content, _joined(path, name))

    return check


def items(inner: Check, count: int | None = None) -> Check:
    """A list (or tuple) of `count` such items; None: of any number."""

    def check(value: Any, path: str) -> None:
        if not isinstance(value, (list, tuple)) or count not in (None, len(value)):
            raise wrong(path, value, "a list" if count is None else f"a list of {count}")
        for index, content in enumerate(value):
            inner(content, f"{path}[{index}]")

    return check


def tensor(shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Check:
    """A plain tensor of finite numbers: dense, with data, and no larger than its storage.

    `dtype`: None: any floating-point type.
    """

    def check(value: Any, path: str) -> None:
        kind = "floating-point numbers" if dtype is None else str(dtype).removeprefix("torch.")
        plain(value, path)
        if value.shape != shape or (not value.is_floating_point() if dtype is None else value.dtype != dtype):
            raise wrong(path, value, f"a tensor {tuple(shape)} of {kind}")
        if not is_finite(value):
            raise wrong(path, _NotFinite(value), "finite numbers")

    return check


def like(example: torch.Tensor) -> Check:
    """A plain tensor of finite numbers with the shape and dtype of `example`."""
    return tensor(tuple(example.shape), example.dtype)


def plain(value: Any, path: str) -> None:
    """A dense tensor of real numbers, as training makes them.

    A file can also hold sparse, quantised or nested tensors, tensors without data, and views that are much larger than
    their storage.
    """
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        raise wrong(path, value if not isinstance(value, torch.Tensor) else type(value), "a tensor")
    if value.layout != torch.strided or value.is_meta or value.dtype not in _REAL:
        kind = ", ".join(map(str, (value.layout, value.device, value.dtype)))
        raise wrong(path, kind, "a dense tensor of plain numbers")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise wrong(path, value, "a tensor no larger than its data in the file")


def is_finite(value: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite; ten times faster than `isfinite().all()`, and without its memory."""
    if not value.is_floating_point() or value.numel() == 0:
        return True
    return bool(torch.stack(torch.aminmax(value.detach())).isfinite().all())


class _NotFinite:
    """Says which kind of number is in a tensor."""

    def __init__(self, value: torch.Tensor) -> None:
        nan = int(value.isnan().sum())
        self._text = f"{nan} times NaN" if nan else f"{int(value.isinf().sum())} times infinite"

    def __repr__(self) -> str:
        return self._text


def _joined(path: str, name: Any) -> str:
    name = str(name) if str(name).isprintable() else repr(name)
    name = name if len(name) <= 80 else f"{name[:77]}..."
    return f"{path}.{name}" if path else name


def _more(names: list) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
