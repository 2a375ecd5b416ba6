"""What is found in a folder: a layout with its splits, and the reader of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ...errors import DataError
from ..files import RawImage

Family = Literal["coco", "voc", "yolo", "labelme"]
FAMILIES: tuple[Family, ...] = ("coco", "voc", "yolo", "labelme")
"""In the order in which a folder that holds several is read."""

Contents = tuple[list[str], list[int], Iterator[RawImage | DataError]]
"""Class names, their category ids, and the images; bad records are `DataError`s among the images."""
Read = Callable[[Sequence[str] | None, bool], Contents]
"""Reads a split: (names to use instead of the data's own, or None; whether images may lie outside the root)."""


@dataclass
class Layout:
    """A data set as it lies in a folder.

    Attributes:
        family: the kind of annotation files.
        title: the layout's name for messages, such as "COCO, Roboflow export".
        splits: the name of each split, as the data spell it, and its reader.
        notes: what a reader left out or had to choose; reading may add to it.
        unlabelled: splits without boxes (COCO's test sets), used only if asked for by name.
    """

    family: Family
    title: str
    splits: dict[str, Read]
    notes: list[str] = field(default_factory=list)
    unlabelled: frozenset[str] = frozenset()

    def note(self, text: str) -> None:
        """Add a note, once."""
        if text not in self.notes:
            self.notes.append(text)
