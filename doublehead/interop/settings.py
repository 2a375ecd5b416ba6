"""Changes of a recipe as text: "model.roi.sampling_ratio=2"."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

from ..config import Recipe, parse
from .mapping import ConversionError


def with_settings(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """The recipe with some fields set.

    Args:
        settings: each `field=value`, the field's full name, the value as JSON or as the flags of training spell it:
            `model.image.min_size=640`, `model.image.min_size=[640,800]`, `model.image.channel_order=bgr`.

    Raises:
        ConversionError: no such field, or a value that it does not accept.
    """
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise ConversionError(f"--set {setting!r}: expected FIELD=VALUE, such as model.backbone.norm_eps=1e-5")
        recipe = _replaced(recipe, path, path.split("."), text)
    return recipe


def _replaced(config: Any, path: str, names: Sequence[str], text: str) -> Any:
    """`config` with the field set that `names` lead to, the last part of `path`."""
    name, rest = names[0], names[1:]
    hints = typing.get_type_hints(type(config), include_extras=True)
    if name not in hints:
        raise ConversionError(f"--set {path}: no field {name!r}; here are {', '.join(hints)}")
    inner = getattr(config, name)
    if rest:
        if not dataclasses.is_dataclass(inner):
            raise ConversionError(f"--set {path}: {name!r} has no fields")
        return dataclasses.replace(config, **{name: _replaced(inner, path, rest, text)})
    if dataclasses.is_dataclass(inner):
        fields = ", ".join(typing.get_type_hints(type(inner)))
        raise ConversionError(f"--set {path}: set one of the fields of {name!r}: {fields}")
    try:
        return dataclasses.replace(config, **{name: parse(text, hints[name], path)})
    except ValueError as error:
        raise ConversionError(f"--set: {error}") from error
