"""Changes of a recipe as text: "model.roi.sampling_ratio=2"."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Sequence
from typing import Any

from ..config import Recipe
from .mapping import ConversionError


def with_settings(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """The recipe with some fields set.

    Args:
        settings: each `field=value`, the field dotted, the value as JSON or a bare word: `model.image.min_size=[640]`,
            `model.image.channel_order=bgr`.

    Raises:
        ConversionError: no such field, or a value that it does not accept.
    """
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise ConversionError(f"--set {setting!r}: expected FIELD=VALUE, such as model.backbone.norm_eps=1e-5")
        recipe = _replaced(recipe, path.split("."), _value(text), setting)
    return recipe


def _replaced(config: Any, path: Sequence[str], value: Any, setting: str) -> Any:
    hints = typing.get_type_hints(type(config))
    name, rest = path[0], path[1:]
    if name not in hints:
        raise ConversionError(f"--set {setting!r}: no field {name!r}; here are {', '.join(hints)}")
    inner = getattr(config, name)
    if rest:
        if not dataclasses.is_dataclass(inner):
            raise ConversionError(f"--set {setting!r}: {name!r} has no fields")
        return dataclasses.replace(config, **{name: _replaced(inner, rest, value, setting)})
    if dataclasses.is_dataclass(inner):
        fields = ", ".join(typing.get_type_hints(type(inner)))
        raise ConversionError(f"--set {setting!r}: set one of the fields of {name!r}: {fields}")
    return dataclasses.replace(config, **{name: _checked(value, hints[name], setting)})


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _checked(value: Any, hint: Any, setting: str) -> Any:
    """`value` as `hint` wants it: whole numbers serve as fractions, lists as tuples."""
    kind, options = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        for option in options:
            try:
                return _checked(value, option, setting)
            except ConversionError:
                continue
    elif kind is typing.Literal:
        if value in options:
            return value
        raise ConversionError(f"--set {setting!r}: expected one of {', '.join(map(str, options))}")
    elif kind is tuple and isinstance(value, list):
        wanted = [options[0]] * len(value) if options[-1] is Ellipsis else options
        if len(wanted) == len(value) > 0:
            return tuple(_checked(item, item_hint, setting) for item, item_hint in zip(value, wanted, strict=True))
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif isinstance(hint, type) and type(value) is hint:
        return value
    elif hint is types.NoneType and value is None:
        return None
    said = hint.__name__ if isinstance(hint, type) else str(hint)
    raise ConversionError(f"--set {setting!r}: expected {said}, got {value!r}")
