"""Finds out in which layout the data in a folder lie.

A folder that holds several kinds of annotations is read by the first of `FAMILIES`, and the others are said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ...errors import DataError
from .coco import find_coco
from .layout import FAMILIES, Family, Layout
from .voc import find_voc

FINDERS: dict[Family, Callable[[Path], Layout | None]] = {"coco": find_coco, "voc": find_voc}


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
        raise DataError(f"{root}: no such folder (data.root)", "missing folder")
    found = [layout for family in families if family in FINDERS and (layout := FINDERS[family](root))]
    if not found:
        raise DataError(f"{root}: unknown layout")
    layout = found[0]
    for other in found[1:]:
        layout.note(f"{other.title} lies there too, --data.format {other.family} reads it")
    return layout
