"""The one decoder of configuration values, whichever way they come.

- `from_dict`: from JSON, a recipe or a checkpoint's description.  Types are strict: text is no number.
- `parse`: from text, as in `--set FIELD=VALUE`.
- `check`: from a configuration that is built already, by the flags of a command line or in Python.

All three apply the bounds of `schema`, and refuse in the same words: the field by its full name, what came, and what
is accepted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import numbers
import re
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from .schema import Recipe

_LARGEST = 2**63  # no field means anything near it; and NaN is not below it
_NOUNS = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}
_TRUTHS = {"true": True, "True": True, "false": False, "False": False}
_NOTHING = ("none", "None", "null")


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as nested plain dicts, ready for JSON."""
    return dataclasses.asdict(config)


def field_names(cls: type = Recipe, prefix: str = "") -> Iterator[str]:
    """The full names of all values in a configuration: `train.steps`, `model.head.kind`, ..."""
    for field, hint in _hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from field_names(hint, f"{prefix}{field}.")
        else:
            yield f"{prefix}{field}"


def from_dict(values: dict[str, Any], cls: type = Recipe) -> Any:
    """Rebuild what `to_dict` gave; fields that are left out have their defaults.

    Lists become tuples; 2.0 serves as a whole number, and 2 as a fraction.

    Raises:
        ValueError: a key that `cls` does not have (a newer or foreign file), or a value that its field does not accept.
    """
    return _decode(values, cls, "")


def parse(text: str, hint: Any, name: str) -> Any:
    """A field's value from text.

    Spellings are those of JSON and those of the command lines' flags: `true` or `True`, `null`, `none` or `None`, text
    with or without quotes, and lists as `[1, 2]`, `1,2` or `1 2`.

    Args:
        hint: the field's annotation, with its bounds (`typing.get_type_hints(cls, include_extras=True)`).
        name: the field's full name, for the message.

    Raises:
        ValueError: the field does not accept it.
    """
    return _decode(_plain(text, hint), hint, name)


def check(config: Any, name: str = "") -> None:
    """Check the numbers, names and lists of a configuration, however it was built.

    Args:
        config: one of the dataclasses of `schema`.
        name: where it stands in a recipe, such as `train`; empty for a whole one.

    Raises:
        ValueError: a field has a value that it does not accept.
    """
    for field, hint in _hints(type(config)).items():
        value = getattr(config, field)
        if dataclasses.is_dataclass(hint):
            check(value, _joined(name, field))
        elif _without_bounds(hint) not in (str, bool):  # paths serve as text, and anything has a truth value
            _decode(value, hint, _joined(name, field), in_python=True)


def _decode(value: Any, hint: Any, name: str, in_python: bool = False, optional: bool = False) -> Any:
    """`value` as `hint` wants it.

    Args:
        in_python: whole numbers have to be integers, of any type of them.
        optional: None would have been accepted too.
    """
    if dataclasses.is_dataclass(hint):
        return _decode_fields(value, hint, name)
    inner = _inner_of_optional(hint)
    if inner is not None:
        return None if value is None else _decode(value, inner, name, in_python, optional=True)
    plain, bounds = _split(hint)
    kind, options = typing.get_origin(plain), typing.get_args(plain)
    if kind is tuple and isinstance(value, (list, tuple)) and (options[-1] is Ellipsis or len(options) == len(value)):
        hints = [options[0]] * len(value) if options[-1] is Ellipsis else options
        items = zip(value, hints, strict=True)
        value = tuple(
            _decode(item, item_hint, f"{name}[{index}]", in_python) for index, (item, item_hint) in enumerate(items)
        )
        right = True
    elif kind is Literal:
        right = type(value) is str and value in options
    else:
        value, right = _number(value, plain, in_python) if plain in (int, float) else (value, type(value) is plain)
    if not right or not all(bound.accepts(value) for bound in bounds):
        raise _refusal(name, value, _described(plain) + "".join(map(str, bounds)) + (" or None" if optional else ""))
    return value


def _number(value: Any, kind: type, in_python: bool) -> tuple[Any, bool]:
    """The number, and whether it is of that kind and finite."""
    if kind is int and type(value) is float and value.is_integer() and not in_python:
        value = int(value)
    if in_python:
        right = isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
    else:
        right = type(value) in ((int,) if kind is int else (int, float))
    return value, bool(right and abs(value) < _LARGEST)


def _decode_fields(values: Any, cls: type, name: str) -> Any:
    if not isinstance(values, dict):
        raise _refusal(name or cls.__name__, values, f"a dictionary of {cls.__name__} fields")
    hints = _hints(cls)
    unknown = sorted(ascii(key)[1:-1] for key in set(values) - set(hints))
    if unknown:
        raise ValueError(f"unknown {cls.__name__} fields: {', '.join(unknown)}; known are: {', '.join(hints)}")
    return cls(**{field: _decode(value, hints[field], _joined(name, field)) for field, value in values.items()})


def _plain(text: str, hint: Any) -> Any:
    """What JSON would have for `text` where `hint` is wanted; the text itself if it cannot be read so."""
    inner = _inner_of_optional(hint)
    if inner is not None:
        return None if text in _NOTHING else _plain(text, inner)
    hint, _ = _split(hint)
    if typing.get_origin(hint) is tuple:
        return _plain_list(text, typing.get_args(hint)[0])
    if hint is bool:
        return _TRUTHS.get(text, text)
    for read in {int: (int, float), float: (float,)}.get(hint, ()):
        with contextlib.suppress(ValueError):
            return read(text)
    if text.startswith('"'):
        with contextlib.suppress(ValueError):
            return json.loads(text)
    return text


def _plain_list(text: str, item_hint: Any) -> Any:
    if text.startswith("["):
        try:
            return json.loads(text, parse_int=float if _split(item_hint)[0] is float else int)
        except (ValueError, RecursionError):
            return text
    return [_plain(item, item_hint) for item in re.split(r"[,\s]+", text.strip(", \t")) if item]


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _split(hint: Any) -> tuple[Any, tuple]:
    """A type, and its bounds."""
    return (hint.__origin__, hint.__metadata__) if typing.get_origin(hint) is Annotated else (hint, ())


def _without_bounds(hint: Any) -> Any:
    return _split(_inner_of_optional(hint) or hint)[0]


def _inner_of_optional(hint: Any) -> Any:
    """X of `X | None`, with the bounds of both; None if `hint` is not of this kind."""
    plain, bounds = _split(hint)
    if typing.get_origin(plain) not in (types.UnionType, typing.Union):
        return None
    (inner,) = (option for option in typing.get_args(plain) if option is not types.NoneType)
    return Annotated[(inner, *bounds)] if bounds else inner


def _described(plain: Any) -> str:
    options = typing.get_args(plain)
    if typing.get_origin(plain) is Literal:
        return "one of " + ", ".join(options)
    if typing.get_origin(plain) is tuple:
        return "a list" if options[-1] is Ellipsis else f"a list of {len(options)}"
    return _NOUNS[plain]


def _joined(name: str, field: str) -> str:
    return f"{name}.{field}" if name else field


def _refusal(name: str, value: Any, accepted: str) -> ValueError:
    shown = repr(value) if type(value) is not int or abs(value) < _LARGEST else "a huge number"
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return ValueError(f"{name} is {shown}, {accepted} is accepted")
