"""The message for a folder in no accepted layout: what lies there, what it resembles, and what is accepted."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ...errors import DataError
from ..coco_json import load_coco
from .folders import IMAGE_SUFFIXES, files_in, is_file, json_kind, subfolders
from .layout import Family, Layout

ACCEPTED: dict[Family, str] = {
    "coco": "COCO (annotations/instances_*.json or {train,val}.json, with images/ or the splits' folders; the exports "
    "of Roboflow, CVAT, Label Studio)",
    "voc": "Pascal VOC (Annotations/ with JPEGImages/, with or without lists; XML beside the images)",
    "yolo": "YOLO (data.yaml or classes.txt, labels/ beside images/)",
    "labelme": "LabelMe (JSON beside the images)",
}
FOREIGN = {
    (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".rar", ".7z"): "an archive: unpack it",
    (".tfrecord", ".tfrecords", ".tfrec", ".record"): "TensorFlow's records: export the set as COCO JSON instead",
    (".parquet", ".arrow"): "a table of Hugging Face's datasets: export the set as COCO JSON instead",
    (".csv", ".tsv"): "a table: export the set as COCO JSON instead",
}
SHOWN = 4
FOLDERS = 60
"""Folders inside that are looked at."""
Matches = Callable[[Path], Layout | None]


def unknown_layout(root: Path, families: Sequence[Family], matches: Matches) -> DataError:
    """The error for `root`.

    Args:
        families: the kinds of annotations that were looked for.
        matches: the accepted layout of a folder, or None.
    """
    seems = _resembles(root, matches)
    accepted = "; ".join(ACCEPTED[family] for family in families)
    text = f"{root}: not in a layout that is known. There: {_contents(root)}. {seems}Accepted: {accepted}"
    return DataError(text, "unknown layout")


def no_folder(root: Path) -> DataError:
    """The error for a root that is no folder."""
    if root.is_file():
        kind = next((what for suffixes, what in FOREIGN.items() if root.suffix.lower() in suffixes), None)
        what = f"{kind}, and give the folder" if kind else f"give the data set's folder, such as {root.parent}"
        return DataError(f"{root}: a file, not a folder (data.root); {what}", "missing folder")
    beside = [path.name for path in subfolders(root.parent)]
    near = difflib.get_close_matches(root.name, beside, n=1)
    hint = f"; {root.parent / near[0]} is there" if near else ""
    return DataError(f"{root}: no such folder (data.root){hint}", "missing folder")


def _contents(root: Path) -> str:
    """The names of a few folders and files."""
    folders = [f"{path.name}/" for path in subfolders(root)]
    try:
        files = sorted(entry.name for entry in os.scandir(root) if entry.is_file() and not entry.name.startswith("."))
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    few = [*folders[:SHOWN], *files[:SHOWN]]
    more = len(folders) + len(files) - len(few)
    return ", ".join(name[:60] for name in few) + (f" and {more} more" if more else "") if few else "nothing"


def _resembles(root: Path, matches: Matches) -> str:
    """A sentence about what is probably wrong; empty: nothing is recognised."""
    if layout := matches(root):
        return f"{layout.title} lies there, --data.format {layout.family} reads it. "
    inside = [root, *_below(root)]
    right = [folder for folder in inside[1:] if matches(folder) and _has_pictures(folder)]
    right = [folder for folder in right if folder.parent not in right]
    if len(right) == 1:
        return f"The data set is one folder further in: give {right[0]}. "
    if right:
        return f"There are several data sets in it: give one, such as {right[0]}. "
    for above in list(root.absolute().parents)[:2]:
        if matches(above):
            return f"It is a part of a data set: give {above}. "
    for find in (_foreign_files, _lost_json, _foreign_json, _pictures_alone):
        if said := find(root, inside):
            return f"{said}. "
    return ""


def _has_pictures(folder: Path) -> bool:
    return any(files_in(place, IMAGE_SUFFIXES) for place in (folder, *_below(folder)))


def _below(root: Path) -> list[Path]:
    """The folders inside and those in them."""
    first = subfolders(root)[:FOLDERS]
    return [*first, *[inner for folder in first for inner in subfolders(folder)]][:FOLDERS]


def _foreign_files(root: Path, folders: Sequence[Path]) -> str | None:
    for suffixes, what in FOREIGN.items():
        for folder in folders:
            if names := files_in(folder, suffixes):
                return f"{(folder / names[0]).relative_to(root)} is {what}"
    for folder in folders[:1]:
        for name in files_in(folder, (".xml",))[:3]:
            if is_file(folder / name) and b"<annotations" in (folder / name).read_bytes()[:2000]:
                return f"{name} holds all images in one, as CVAT's own XML does: export as COCO 1.0 instead"
    return None


def _lost_json(root: Path, folders: Sequence[Path]) -> str | None:
    for folder in folders:
        for name in files_in(folder, (".json",))[:FOLDERS]:
            if json_kind(folder / name) == "coco":
                where = (folder / name).relative_to(root)
                return f"{where} seems to be COCO's: move it into {root / 'annotations'}, called train.json or val.json"
    return None


def _foreign_json(root: Path, folders: Sequence[Path]) -> str | None:
    for folder in folders:
        for name in files_in(folder, (".json", ".jsonl"))[:1]:
            try:
                load_coco(folder / name)
            except DataError as error:
                return str(error)
    return None


def _pictures_alone(root: Path, folders: Sequence[Path]) -> str | None:
    held = next((folder for folder in folders if files_in(folder, IMAGE_SUFFIXES)), None)
    files = {
        suffix for folder in folders for suffix in (".json", ".xml", ".txt", ".yaml") if files_in(folder, (suffix,))
    }
    if held is None:
        return "It has no pictures" if files else None
    if not files:
        return "It has pictures without annotations: label them, or look for objects in them with `doublehead detect`"
    return None
