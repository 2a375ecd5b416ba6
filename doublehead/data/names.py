"""Class names: what is accepted as one, and what to say of one that is not known."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

from ..errors import UNPRINTABLE

SHOWN = 12
"""Names of classes that a message lists before it says how many more there are."""
LONGEST = 80
"""Letters of one name that a message shows."""


def clean_name(name: str) -> str:
    """Without white space and byte order marks around it, which lists read line by line leave there."""
    return name.strip().strip("\ufeff").strip()


def wrong_name(name: str) -> str | None:
    """What is wrong with a cleaned class name, in few words; None: nothing."""
    if not name:
        return "is empty"
    found = next((UNPRINTABLE[kind] for kind in map(unicodedata.category, name) if kind in UNPRINTABLE), None)
    return f"has {found} inside" if found else None


def shown_name(name: str) -> str:
    """The name as a one-line message can have it."""
    name = name if len(name) <= LONGEST else name[:LONGEST] + "..."
    return name if wrong_name(name) is None else ascii(name)


def listed(names: Iterable[str]) -> str:
    """Names for a message: the first `SHOWN`, and how many more there are."""
    names = list(names)
    more = f", ... ({len(names)} in all)" if len(names) > SHOWN else ""
    return (", ".join(map(shown_name, names[:SHOWN])) or "none") + more


def similar_name(name: str, classes: Iterable[str]) -> str | None:
    """The class that differs from `name` in upper and lower case, white space, `_` and `-` alone, or None."""
    return next((known for known in classes if _folded(known) == _folded(name)), None)


def not_a_class(name: str, classes: Sequence[str]) -> str:
    """The end of a message on an object whose class the detector does not have."""
    similar = similar_name(name, classes)
    hint = f"; '{shown_name(similar)}' differs from it in case or white space alone" if similar is not None else ""
    return f"class '{shown_name(name)}' is not among the classes {listed(classes)}{hint}"


def _folded(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter not in "_-" and not letter.isspace())
