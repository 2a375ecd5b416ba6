"""Files of a detection: the pictures to read, and the results in their folder."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from doublehead.engine.files import write_json

ENDINGS = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
VIDEOS = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv"}
HOW_TO_SPLIT = "make pictures of a video first: ffmpeg -i VIDEO frames/%06d.jpg"
JSON_FILE = "detections.json"
LONGEST_NAME = 255
"""Most bytes of a file's name."""
Entry = dict[str, Any]


def find_pictures(names: Sequence[str], leave_out: Path) -> tuple[list[Path], list[Entry]]:
    """Expand files, folders and patterns, each picture once, in order; and the names that match nothing.

    Args:
        leave_out: pictures in this folder are results of an earlier call, not input.
    """
    files: dict[Path, Path] = {}
    unmatched = []
    for name in names:
        path = Path(name)
        if os.path.isdir(name):  # Path.is_dir raises where a name is too long
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in ENDINGS and not p.is_dir())
            found = [p for p in found if _real(leave_out) not in _real(p).parents]
        elif os.path.lexists(name):
            found = [path]
        else:
            found = sorted(p for p in map(Path, glob.glob(name, recursive=True)) if not p.is_dir())
        if not found:
            unmatched.append({"file": name, "error": _why_none(name, leave_out)})
        files.update({_real(p): p for p in found if _real(p) not in files})
    return list(files.values()), unmatched


def _real(path: Path) -> Path:
    """The path without symbolic links; for circular links `Path.resolve` raises on older Pythons."""
    return Path(os.path.realpath(path))


def _why_none(name: str, leave_out: Path) -> str:
    if not os.path.isdir(name):
        return "no such file, nor does a file match it as a pattern"
    if _real(leave_out) in (_real(Path(name)), *_real(Path(name)).parents):
        return "the folder of the results (--out), whose pictures are left out: give another one, or name the files"
    if any(p.suffix.lower() in VIDEOS for p in Path(name).rglob("*")):
        return f"no picture in this folder, but videos: {HOW_TO_SPLIT}"
    return f"no picture in this folder, nor below it; looked for are {' '.join(sorted(ENDINGS))}"


def output_names(files: Sequence[Path], folder: Path) -> list[str]:
    """A name in `folder` for each picture: its own with the ending .jpg, numbered where two would be the same.

    No name is that of an input in `folder`, nor of another file there: only what an earlier call's JSON lists is
    overwritten.
    """
    inputs = {path.name.lower() for path in files if _real(path).parent == _real(folder)}
    present = {path.name.lower() for path in folder.iterdir()} if folder.is_dir() else set()
    taken = inputs | (present - {name.lower() for name in earlier_pictures(folder)})
    names = []
    for path in files:
        name, number = _named(path.stem, ".jpg"), 2
        while name.lower() in taken:  # some file systems do not tell A.jpg from a.jpg
            name, number = _named(path.stem, f"-{number}.jpg"), number + 1
        taken.add(name.lower())
        names.append(name)
    return names


def _named(stem: str, ending: str) -> str:
    """Stem and ending, the stem cut to the length that file systems accept."""
    while len(os.fsencode(stem + ending)) > LONGEST_NAME:
        stem = stem[:-1]
    return stem + ending


def write_results(
    folder: Path, classes: list[str], entries: list[Entry], unreadable: list[Entry], files: Sequence[Path]
) -> None:
    """Write `detections.json`, and remove annotated pictures that only the file it replaces lists.

    If no picture could be read, as after a mistyped name, the results of an earlier call stay.
    """
    if not entries and earlier_pictures(folder):
        print(f"no picture was read: the results of an earlier call stay in {folder}")
        return
    kept = {entry["picture"] for entry in entries} | {file.name for file in files}
    earlier = [folder / name for name in earlier_pictures(folder) if name not in kept]
    write_json(folder / JSON_FILE, {"classes": classes, "pictures": entries, "unreadable": unreadable})
    stale = [path for path in earlier if os.path.isfile(path) and not path.is_symlink()]  # or too long a name
    for path in stale:
        path.unlink()
    if stale:
        print(f"{len(stale)} annotated pictures of an earlier call removed from {folder}")


def earlier_pictures(folder: Path) -> list[str]:
    """The annotated pictures that a `detections.json` in the folder lists; only plain names count."""
    if not (folder / JSON_FILE).is_file():  # reading a pipe would wait forever
        return []
    try:
        content = json.loads((folder / JSON_FILE).read_text("utf-8"))
        names = [entry["picture"] for entry in content["pictures"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    return [name for name in names if isinstance(name, str) and name == Path(name).name and name.endswith(".jpg")]
