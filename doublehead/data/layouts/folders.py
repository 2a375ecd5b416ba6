"""Looks at folders: which split a name means, images, annotation files, and what a JSON file seems to hold."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm"))
SPLIT_WORDS = {
    "train": ("train", "training", "trainval"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
"""What names of splits mean."""
BESIDE_SPLITS = frozenset("images image imgs img pictures set data coco voc yolo labelme".split())
"""Words in the name of a split's folder that say nothing more."""
IMAGE_FOLDERS = ("images", "JPEGImages", "image", "imgs", "img", "data")
COCO_KEYS = frozenset(("info", "licenses", "images", "annotations", "categories", "type"))
LABELME_KEYS = frozenset(("version", "flags", "shapes", "imagePath", "imageData", "imageHeight", "imageWidth",
                          "lineColor", "fillColor"))  # fmt: skip
PEEK = 4096
"""Characters of a file's beginning."""
FIRST_KEY = re.compile(r'\s*\{\s*"([^"\\]{1,80})"\s*:')


def split_word(name: str) -> str | None:
    """`train`, `val` or `test`, if exactly one of these is meant by a name such as `coco_train2017`."""
    words = _words(name)
    meant = {split for split, spellings in SPLIT_WORDS.items() if not set(spellings).isdisjoint(words)}
    return meant.pop() if len(meant) == 1 else None


def _words(name: str) -> list[str]:
    return re.findall("[a-z]+", name.lower())


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, without hidden ones, by name."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    except OSError:
        return []
    return [folder / name for name in sorted(names)]


def split_folders(folder: Path) -> dict[str, Path]:
    """The folders in a folder whose names mean a split and nothing else: `train2017`, not `train-station`."""
    found = [path for path in subfolders(folder) if split_word(path.name)]
    return {path.name: path for path in found if len(set(_words(path.name)) - BESIDE_SPLITS) == 1}


def child(folder: Path, names: Sequence[str]) -> Path | None:
    """The first folder of one of these names, whatever their case."""
    found = {path.name.lower(): path for path in reversed(subfolders(folder))}
    return next((found[name.lower()] for name in names if name.lower() in found), None)


def files_in(folder: Path, suffixes: Iterable[str]) -> list[str]:
    """The names of the files in a folder with one of these suffixes (lower case), without hidden ones, sorted."""
    wanted = frozenset(suffixes)
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if os.path.splitext(entry.name)[1].lower() in wanted]
    except OSError:
        return []
    return sorted(name for name in names if not name.startswith("."))


def images_by_stem(folder: Path) -> dict[str, str]:
    """Stem -> file name of a folder's images; of several with one stem the first in the order of names."""
    return {os.path.splitext(name)[0]: name for name in reversed(files_in(folder, IMAGE_SUFFIXES))}


def json_kind(path: Path) -> Literal["coco", "labelme", "list", "other"]:
    """What a JSON file seems to hold, by its beginning."""
    if not is_file(path):  # opening a pipe may wait forever
        return "other"
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            start = file.read(PEEK)
    except OSError:
        return "other"
    if start.lstrip().startswith("["):
        return "list"
    found = FIRST_KEY.match(start)
    key = found[1] if found else None
    if key in COCO_KEYS and '"images"' not in start and '"annotations"' not in start and len(start) < PEEK:
        return "other"  # a whole file, such as the notes.json of Label Studio
    return "coco" if key in COCO_KEYS else "labelme" if key in LABELME_KEYS else "other"


def is_file(path: Path) -> bool:
    """Whether this is a regular file; False for names that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def images_below(folder: Path, above: frozenset[str] = frozenset()) -> list[Path]:
    """The images in a folder and in those inside it, without hidden ones, sorted by path.

    `above`: the real paths of folders not to enter again, because a link may lead upwards.
    """
    here = os.path.realpath(folder)
    if here in above:
        return []
    found = [folder / name for name in files_in(folder, IMAGE_SUFFIXES)]
    return sorted(found + [path for inside in subfolders(folder) for path in images_below(inside, above | {here})])
