"""Finds LabelMe's JSON files: beside the pictures, in `annotations/` or the like beside `images/`, in split folders.

The JSON files are the set: a picture without one is left out, and said.  A picture is looked up by the last part of
`imagePath` beside the JSON file and in the folder of images, then by the JSON file's own name.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath

from ...errors import DataError
from ..coco_json import shown
from ..labelme import read_labelme
from ..paths import check_inside
from .folders import IMAGE_FOLDERS, child, files_in, images_by_stem, is_file, json_kind, split_folders
from .layout import Contents, Layout

ANNOTATION_FOLDERS = ("annotations", "labels", "json", "jsons", "labelme")
Pair = tuple[Path, Path]
"""The folders of pictures and of their JSON files."""


def find_labelme(root: Path) -> Layout | None:
    """The layout of LabelMe's files in a folder; None: there is none."""
    pair = _pair(root)
    if pair is not None:
        return _layout({"all": pair})
    nested = _nested(root)
    found = {name: pair for name, folder in split_folders(root).items() if (pair := _pair(folder))}
    return _layout(nested or found) if nested or found else None


def _pair(folder: Path) -> Pair | None:
    images, annotations = child(folder, IMAGE_FOLDERS), child(folder, ANNOTATION_FOLDERS)
    if images and annotations and _has_files(annotations):
        return images, annotations
    if images and _has_files(images):
        return images, images
    if images and _has_files(folder):
        return images, folder
    return (folder, folder) if _has_files(folder) else None


def _nested(root: Path) -> dict[str, Pair]:
    """`images/train`, with its JSON files in it or in `annotations/train`."""
    images, annotations = child(root, IMAGE_FOLDERS), child(root, ANNOTATION_FOLDERS)
    if images is None:
        return {}
    of_files = split_folders(annotations) if annotations else {}
    pairs = {name: (folder, of_files.get(name, folder)) for name, folder in split_folders(images).items()}
    return {name: pair for name, pair in pairs.items() if _has_files(pair[1])}


def _has_files(folder: Path) -> bool:
    return any(json_kind(folder / name) == "labelme" for name in files_in(folder, (".json",))[:20])


def _files(folder: Path) -> list[Path]:
    """The JSON files of a folder, but those of other tools."""
    names = files_in(folder, (".json",))
    return [folder / name for name in names if json_kind(folder / name) == "labelme"]


def _layout(pairs: dict[str, Pair]) -> Layout:
    layout = Layout("labelme", "LabelMe", {})
    for name, pair in pairs.items():
        layout.splits[name] = partial(_read, layout, pair, [annotations for _, annotations in pairs.values()])
    return layout


def _read(
    layout: Layout, pair: Pair, everything: Sequence[Path], classes: Sequence[str] | None, outside_root: bool
) -> Contents:
    images, annotations = pair
    files = _files(annotations)
    others = len(files_in(annotations, (".json",))) - len(files)
    if others:
        layout.note(f"{others} x JSON file in {annotations.name} that is not LabelMe's: left out")
    pictures = images_by_stem(images)
    bare = pictures.keys() - {path.stem for path in files}
    if bare:
        layout.note(f"{len(bare)} x picture without a JSON file in {images.name}, such as {min(bare)}: left out")
    listed = [(pictures.get(path.stem, path.stem), path) for path in files]
    every_file = (path for folder in everything for path in _files(folder))
    return read_labelme(listed, partial(_locate, images, pictures, outside_root), every_file, classes)


def _locate(images: Path, pictures: dict[str, str], outside_root: bool, name: str, file: Path) -> Path:
    said = name.replace("\\", "/")
    last = PurePosixPath(said).name
    for folder in dict.fromkeys((file.parent, images)):
        if last and last != ".." and is_file(folder / last):
            return folder / last
    if file.stem in pictures:
        return images / pictures[file.stem]
    check_inside(said, f"{file}: imagePath", outside_root)
    if is_file(file.parent / said):
        return file.parent / said
    raise DataError(f"{file}: no image {shown(last)} beside it, nor in {images}", "missing image")
