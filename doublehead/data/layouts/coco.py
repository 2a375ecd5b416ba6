"""Finds COCO JSON files as the usual tools export them, and the images that they name.

In this order: `annotations/instances_*.json` (COCO itself, CVAT), other COCO files in `annotations/` (`train.json`),
one file in each split's folder beside its images (Roboflow: `train/_annotations.coco.json`), files at the root (Label
Studio: `result.json`).  The images of a file are in the first folder that has most of those it names.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from ...errors import DataError
from ..coco import read_coco_file
from ..coco_json import load_coco, shown
from ..paths import check_inside
from .folders import IMAGE_FOLDERS, child, files_in, is_file, json_kind, split_folders, split_word, subfolders
from .layout import Contents, Layout

ROBOFLOW = "_annotations.coco"
"""How the names of Roboflow's files begin."""
SAMPLE = 40
"""Images whose names are looked up in each folder."""


def find_coco(root: Path) -> Layout | None:
    """The COCO layout in a folder; None: there is none."""
    return _annotations_folder(root) or _split_folders(root) or _at_root(root)


def _annotations_folder(root: Path) -> Layout | None:
    folder = child(root, ("annotations",))
    if folder is None:
        return None
    names = files_in(folder, (".json",))
    found = {Path(name).stem.removeprefix("instances_"): folder / name for name in names if
             name.startswith("instances_")}  # fmt: skip
    if not found:
        return _layout(root, _by_stem(folder, names), "COCO")
    tests = {Path(name).stem.removeprefix("image_info_"): folder / name for name in names if
             name.startswith("image_info_")}  # fmt: skip
    title = "COCO, CVAT export" if set(found) == {"default"} else "COCO"
    return _layout(root, {**tests, **found}, title, frozenset(tests.keys() - found.keys()))


def _split_folders(root: Path) -> Layout | None:
    found: dict[str, Path] = {}
    for name, folder in split_folders(root).items():
        files = list(_by_stem(folder, files_in(folder, (".json",))).values())
        if len(files) > 1:
            raise DataError(f"{folder}: several COCO files, {files[0].name} and {files[1].name}; one is accepted there")
        if files:
            found[name] = files[0]
    return _layout(root, found, _title(found.values()))


def _at_root(root: Path) -> Layout | None:
    found = _by_stem(root, files_in(root, (".json",)))
    return _layout(root, found, _title(found.values()))


def _by_stem(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    return {Path(name).stem: folder / name for name in names if json_kind(folder / name) == "coco"}


def _title(files: Any) -> str:
    names = {path.name for path in files}
    if names and all(name.startswith(ROBOFLOW) for name in names):
        return "COCO, Roboflow export"
    return "COCO, Label Studio export" if names == {"result.json"} else "COCO"


def _layout(root: Path, files: dict[str, Path], title: str, unlabelled: frozenset[str] = frozenset()) -> Layout | None:
    if not files:
        return None
    layout = Layout("coco", title, {}, unlabelled=unlabelled)
    for name, path in files.items():
        layout.splits[name] = partial(_read, layout, root, name, path, list(files.values()))
    return layout


def _read(
    layout: Layout, root: Path, split: str, path: Path, files: list[Path], classes: Sequence[str] | None,
    outside_root: bool,
) -> Contents:  # fmt: skip
    content = load_coco(path, has_boxes=split not in layout.unlabelled)
    unused = _placeholder(layout, path, content, files) if "Roboflow" in layout.title else ()
    return read_coco_file(path, content, _Images(root, split, path, content, outside_root), classes, unused)


def _placeholder(layout: Layout, path: Path, content: dict[str, list[Any]], files: list[Path]) -> tuple[int, ...]:
    """Category 0 if no box of any split has it: Roboflow's name of the project."""
    named = [entry for entry in content["categories"] if isinstance(entry, dict) and entry.get("id") == 0]
    if len(named) != 1 or len(content["categories"]) == 1:
        return ()
    for file in files:
        annotations = content["annotations"] if file == path else load_coco(file)["annotations"]
        if any(isinstance(entry, dict) and entry.get("category_id") == 0 for entry in annotations):
            return ()
    layout.note(f"category 0, {shown(named[0].get('name'))}, has no boxes: dropped")
    return (0,)


class _Images:
    """Finds the files of a COCO file's images.

    A name is looked up as it is, with `\\` as `/`, in each of the usual folders.  Where no folder has the names, as
    with the paths on another machine that Label Studio writes, their last parts are looked up, if these are unique.
    """

    def __init__(self, root: Path, split: str, path: Path, content: dict[str, list[Any]], outside_root: bool):
        self.outside_root = outside_root
        names = [entry.get("file_name") for entry in content["images"] if isinstance(entry, dict)]
        names = [name for name in names if isinstance(name, str) and name]
        folders = _candidates(root, split, path)
        sample = names[:: -(-len(names) // SAMPLE) or 1]
        self.folder, self.last_part = folders[0], False
        if self._choose(folders, sample) or not sample:
            return
        lasts = [_last(name) for name in names]
        if len(set(lasts)) == len(lasts):
            self.last_part = True
            if self._choose(folders, sample):
                return
            self.last_part = False
        for name in sample[:1]:
            check_inside(_slashes(name), f"{path}: file_name", outside_root)
        where = ", ".join(str(folder.relative_to(root)) for folder in folders[:6])
        raise DataError(f"{path}: none of its images, such as {shown(sample[0])}, is in {root} ({where})",
                        "missing image")  # fmt: skip

    def _choose(self, folders: list[Path], sample: list[str]) -> bool:
        """Take the folder with most of the names; False: no folder has any."""
        counts = [sum(self._has(folder, name) for name in sample) for folder in folders]
        best = max(counts, default=0)
        if best:
            self.folder = folders[counts.index(best)]
        return best > 0

    def _has(self, folder: Path, name: str) -> bool:
        name = _last(name) if self.last_part else _slashes(name)
        try:
            check_inside(name, "", self.outside_root)
        except DataError:
            return False
        return is_file(folder / name)

    def __call__(self, name: str, where: str) -> str:
        name = _last(name) if self.last_part else _slashes(name)
        check_inside(name, where, self.outside_root)
        return str(self.folder / name)


def _candidates(root: Path, split: str, path: Path) -> list[Path]:
    """The folders in which a file's images may be, the likely ones first."""
    word = split_word(split)
    splits = dict.fromkeys((split, split.replace("-dev", ""), *((word,) if word else ())))
    parents = [root, *filter(None, (child(root, (name,)) for name in IMAGE_FOLDERS))]
    likely = [parent / name for name in splits for parent in parents]
    same = [folder for parent in parents for folder in subfolders(parent) if word and split_word(folder.name) == word]
    every = [folder for parent in parents for folder in subfolders(parent)]
    beside = [path.parent] if path.parent.name.lower() != "annotations" else []
    ordered = [*beside, *likely, *same, *parents[1:], root, *every]
    return [folder for folder in dict.fromkeys(ordered) if folder.is_dir()]


def _slashes(name: str) -> str:
    return name.replace("\\", "/")


def _last(name: str) -> str:
    return PurePosixPath(_slashes(name)).name or name
