"""Finds out in which layout the data in a folder lie.

A folder that holds several kinds of annotations is read by the first of `FAMILIES`, and the others are said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ...errors import DataError
from .coco import find_coco
from .labelme import find_labelme
from .layout import FAMILIES, Family, Layout
from .unknown import no_folder, unknown_layout
from .voc import find_voc
from .yolo import find_yolo

FINDERS: dict[Family, Callable[[Path], Layout | None]] = {
    "coco": find_coco, "voc": find_voc, "yolo": find_yolo, "labelme": find_labelme,
}  # fmt: skip


def find_layout(root: str | Path, families: Sequence[Family] = FAMILIES) -> Layout:
    """The layout of the data in `root`.

    Args:
        families: the kinds of annotations to look for.

    Raises:
        DataError: no such folder, or none of the accepted layouts; the message names what lies there, what it
            resembles, and the accepted layouts.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise no_folder(root)
    layout = None
    for family in families:
        if layout is None:
            layout = FINDERS[family](root)
        elif other := _other(family, root):
            layout.note(f"{other.title} lies there too, --data.format {family} reads it")
    if layout is None:
        raise unknown_layout(root, families, _first)
    return layout


def _first(folder: Path) -> Layout | None:
    return next((layout for family in FAMILIES if (layout := _other(family, folder))), None)


def _other(family: Family, root: Path) -> Layout | None:
    """A second layout in a folder; broken ones do not matter."""
    try:
        return FINDERS[family](root)
    except DataError:
        return None
