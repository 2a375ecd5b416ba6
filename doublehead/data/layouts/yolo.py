"""Finds YOLO's label files: by a `data.yaml` (Ultralytics, Roboflow), or a list of names (`classes.txt`, `obj.names`).

The label file of `.../images/.../a.jpg` is `.../labels/.../a.txt`; of an image outside of a folder `images` it lies
beside it.  Without a `data.yaml` the images are in `images/` (with `train/`, `val/` inside, or flat), in
`train/images`, in the folders of splits, or beside the list of names.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ...errors import DataError
from ..yolo import check_names, read_yolo
from .folders import IMAGE_SUFFIXES, child, files_in, images_below, split_folders
from .layout import Contents, Layout
from .yolo_yaml import Description, find_description, images_listed

NAME_FILES = ("classes.txt", "obj.names", "predefined_classes.txt", "_darknet.labels")
OTHER_TEXTS = frozenset((*NAME_FILES, "readme.txt", "readme.roboflow.txt", "readme.dataset.txt", "train.txt", "val.txt",
                         "valid.txt", "test.txt", "notes.txt", "license.txt", "requirements.txt"))  # fmt: skip
"""Text files that are no labels."""


def find_yolo(root: Path) -> Layout | None:
    """The YOLO layout in a folder; None: there is none.

    Raises:
        DataError: the description or the list of names is invalid, or there are label files without names.
    """
    description = find_description(root)
    if description is not None:
        return _described(root, description)
    folders = _image_folders(root)
    if not folders:
        return None
    file = _name_file(root, list(folders.values()))
    if file is None:
        raise DataError(f"{root}: YOLO's label files without the classes' names: write these into "
                        f"{root / 'classes.txt'}, one a line, in the order of the labels' numbers",
                        "missing file")  # fmt: skip
    names = _read_names(file)
    layout = Layout("yolo", f"YOLO with {file.name}", {})
    for split, folder in folders.items():
        layout.splits[split] = partial(_read, layout, root, [folder], names, False)
    return layout


def _described(root: Path, description: Description) -> Layout:
    layout = Layout("yolo", f"YOLO with {description.path.name}", {})
    for text in description.notes:
        layout.note(text)
    for split, places in description.splits.items():
        layout.splits[split] = partial(_read, layout, root, places, description.names, description.key_points)
    return layout


def _read(
    layout: Layout, root: Path, places: Sequence[Path], names: dict[int, str], key_points: bool,
    classes: Sequence[str] | None, outside_root: bool,
) -> Contents:  # fmt: skip
    images: dict[Path, str] = {}
    for place in places:
        found = images_listed(root, place, outside_root) if place.suffix == ".txt" else images_below(place)
        for path in found:
            images.setdefault(path, _name(path, root))
    bare = [path for path in images if not os.path.lexists(label_file(path))]
    if bare and len(bare) == len(images):
        first = label_file(bare[0])
        raise DataError(f"{root}: none of {len(bare)} images has a label file; that of {bare[0].name} would be {first}",
                        "missing annotation file")  # fmt: skip
    if bare:
        layout.note(f"{len(bare)} x image without a label file, such as {_name(bare[0], root)}: counted as empty")
    return read_yolo([(name, path) for path, name in images.items()], label_file, names, classes, key_points)


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def label_file(image: Path) -> Path:
    """The label file of an image: `labels` for the last `images` in its path; else beside it."""
    parts = list(image.parent.parts)
    for position in range(len(parts) - 1, 0, -1):
        if parts[position] == "images":
            there = Path(*parts[:position], "labels", *parts[position + 1 :], f"{image.stem}.txt")
            beside = image.with_suffix(".txt")
            return beside if beside.is_file() and not there.is_file() else there
    return image.with_suffix(".txt")


def _image_folders(root: Path) -> dict[str, Path]:
    """Split -> folder of images that have label files."""
    images = child(root, ("images",))
    if images is not None:
        inside = {name: folder for name, folder in split_folders(images).items() if _has_labels(folder, root)}
        if inside:
            return inside
        if _has_labels(images, root):
            return {"all": images}
    found: dict[str, Path] = {}
    for name, folder in split_folders(root).items():
        place = next((place for place in (folder / "images", folder) if _has_labels(place, root)), None)
        if place is not None:
            found[name] = place
    if found:
        return found
    for folder in (root, root / "obj_train_data"):
        if _has_labels(folder, root):
            return {"all": folder}
    return {}


def _has_labels(folder: Path, root: Path) -> bool:
    """Whether some image in the folder, not below, has a label file in the root."""
    images = {Path(name).stem for name in files_in(folder, IMAGE_SUFFIXES)}
    places = dict.fromkeys((label_file(folder / "any.jpg").parent, folder))
    texts = {name for place in places if place.is_relative_to(root) for name in files_in(place, (".txt",))}
    return any(Path(name).stem in images for name in texts if name.lower() not in OTHER_TEXTS)


def _name_file(root: Path, folders: Sequence[Path]) -> Path | None:
    beside = [place for folder in folders for place in (folder, folder.parent)]
    for folder in dict.fromkeys((root, root / "labels", *beside)):
        for name in NAME_FILES:
            if (folder / name).is_file():
                return folder / name
    return None


def _read_names(path: Path) -> dict[int, str]:
    try:
        lines = path.read_text("utf-8-sig").rstrip().splitlines()
    except ValueError as error:
        raise DataError(f"{path}: not a text file in UTF-8: {error}", "malformed record") from error
    return check_names(dict(enumerate(lines)), str(path))
