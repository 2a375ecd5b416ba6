"""Changes of a configuration from Python: dictionaries, as `{"train": {"steps": 200, "augment": {"crop": 0.5}}}`."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from typing import Any

from .codec import field_names, from_dict, to_dict


def override(config: Any, changes: Mapping[str, Any]) -> tuple[Any, frozenset[str]]:
    """A configuration with some of its fields changed.

    Args:
        config: one of the dataclasses of `schema`, such as a `Recipe`.
        changes: field -> value.  For a field that is a configuration itself: a dictionary of its fields, or another
            configuration.  Paths and devices serve as text, NumPy's numbers as numbers.

    Returns:
        The new configuration, and the full names ("train.steps") of the fields that were given; in a configuration
        those that differ.

    Raises:
        ValueError: there is no such field, with the most similar name; or a field does not accept the value.
    """
    given: set[str] = set()
    values = _merged(to_dict(config), changes, "", given)
    return from_dict(values, type(config)), frozenset(given)


def _merged(values: dict[str, Any], changes: Any, name: str, given: set[str], whole: bool = False) -> dict[str, Any]:
    """`values` with `changes`; `given` gets the full names of fields, of a `whole` configuration those that differ."""
    whole = whole or dataclasses.is_dataclass(changes)
    changes = to_dict(changes) if dataclasses.is_dataclass(changes) else changes
    if not isinstance(changes, Mapping):
        raise ValueError(f"{name} is {changes!r}, a dictionary is accepted, such as {name}={{{_example(values)}}}")
    merged = dict(values)
    for field, value in changes.items():
        full = f"{name}.{field}" if name else str(field)
        if field not in values:
            raise ValueError(_unknown(full, str(field), values, name))
        if isinstance(values[field], dict):
            merged[field] = _merged(values[field], value, full, given, whole)
        elif not (whole and value == values[field]):
            merged[field] = _plain(value)
            given.add(full)
    return merged


def _plain(value: Any) -> Any:
    """What JSON would have for a value of Python."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return value.item()
    if type(value).__name__ == "device":  # torch's, without importing torch
        return str(value)
    return value


def _example(values: dict[str, Any]) -> str:
    field, value = next((f, v) for f, v in values.items() if not isinstance(v, dict))
    return f"{field!r}: {value!r}"


def _unknown(full: str, field: str, values: dict[str, Any], name: str) -> str:
    where = f"{name}." if name else ""
    similar = [f"{where}{found}" for found in difflib.get_close_matches(field, values, n=1)]
    similar = similar or [known for known in field_names() if known.rpartition(".")[2] == field]
    if similar:
        return f"there is no field {full}; did you mean {' or '.join(similar[:3])}?"
    return f"there is no field {full}; the fields {f'of {name} ' if name else ''}are: {', '.join(values)}"
