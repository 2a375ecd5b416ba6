"""Validates class names, and describes unknown ones."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

from ..errors import UNPRINTABLE

SHOWN = 12
"""The number of class names that a message lists."""
LONGEST = 80
"""The number of characters of a name that a message shows."""


def clean_name(name: str) -> str:
    """The name without surrounding white space and byte order marks, which come from text files."""
    return name.strip().strip("\ufeff").strip()


def wrong_name(name: str) -> str | None:
    """Why a cleaned class name is invalid, in a few words; None: it is valid."""
    if not name:
        return "is empty"
    found = next((UNPRINTABLE[kind] for kind in map(unicodedata.category, name) if kind in UNPRINTABLE), None)
    return f"has {found} inside" if found else None


def shown_name(name: str) -> str:
    """The name for a one-line message."""
    name = name if len(name) <= LONGEST else name[:LONGEST] + "..."
    return name if wrong_name(name) is None else ascii(name)


def listed(names: Iterable[str]) -> str:
    """Names for a message: the first `SHOWN`, and the total number."""
    names = list(names)
    more = f", ... ({len(names)} in all)" if len(names) > SHOWN else ""
    return (", ".join(map(shown_name, names[:SHOWN])) or "none") + more


def similar_name(name: str, classes: Iterable[str]) -> str | None:
    """The class that differs from `name` only in case, white space, `_` and `-`; None: there is none."""
    return next((known for known in classes if _folded(known) == _folded(name)), None)


def not_a_class(name: str, classes: Sequence[str]) -> str:
    """The end of a message about an object whose class the detector does not have."""
    similar = similar_name(name, classes)
    hint = f"; '{shown_name(similar)}' differs from it in case or white space alone" if similar is not None else ""
    return f"class '{shown_name(name)}' is not among the classes {listed(classes)}{hint}"


def _folded(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter not in "_-" and not letter.isspace())
