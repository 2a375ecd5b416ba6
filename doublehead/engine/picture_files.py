"""Files of a detection: the pictures to read, and the results in their folder."""

from __future__ import annotations

import glob
import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from doublehead.engine.files import write_json
from doublehead.errors import UserError

ENDINGS = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
VIDEOS = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv"}
OTHER_PICTURES = {".heic", ".heif", ".avif", ".jp2", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".svg", ".psd"}
"""Endings of pictures that are not looked for in folders: Pillow reads few of these, and not everywhere."""
URL = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
STREAMS = {"rtsp", "rtsps", "rtmp", "rtmps", "rtp", "udp", "srt", "mms"}
JSON_FILE = "detections.json"
LONGEST_NAME = 255
"""Most bytes of a file's name."""
Entry = dict[str, Any]
Results = dict[str, Any]
"""The content of `detections.json`."""


class Found(NamedTuple):
    """What the names on a command line stand for."""

    files: list[Path]
    """The pictures to read, each once, in order."""
    unreadable: list[Entry]
    """`file` and `error` of each name that stands for no picture."""
    notes: list[str]
    """What folders hold besides and is left out, a line each."""


def find_pictures(names: Sequence[str], leave_out: Path) -> Found:
    """Expand files, folders and patterns; videos and URLs are no pictures, and their error says what to do.

    Args:
        leave_out: pictures in this folder are results of an earlier call, not input.
    """
    files: dict[Path, Path] = {}
    unreadable, notes = [], []
    for name in names:
        path = Path(name)
        if os.path.isdir(name):  # Path.is_dir raises where a name is too long
            present = [p for p in path.rglob("*") if not p.is_dir() and _real(leave_out) not in _real(p).parents]
            drawn = {p.parent / one for p in present if p.name == JSON_FILE for one in earlier_pictures(p.parent)}
            found = sorted(p for p in present if p.suffix.lower() in ENDINGS and p not in drawn)
            notes += _left_out(name, present, drawn.intersection(present)) if found else []
        elif os.path.lexists(name):
            found = [path]
        else:
            found = sorted(p for p in map(Path, glob.glob(name, recursive=True)) if not p.is_dir())
        if not found:
            unreadable.append({"file": name, "error": _why_none(name, leave_out)})
        for one in found:
            if one.suffix.lower() in VIDEOS:
                video = {"file": str(one), "error": f"a video: {how_to_split(str(one))}"}
                unreadable += [video] if video not in unreadable else []
            else:
                files.setdefault(_real(one), one)
    return Found(list(files.values()), unreadable, notes)


def _left_out(name: str, present: Sequence[Path], drawn: set[Path]) -> list[str]:
    """What to say of a folder's videos, pictures in formats that are not looked for, and results of earlier calls."""
    videos = sorted(path for path in present if path.suffix.lower() in VIDEOS)
    others = Counter(path.suffix.lower() for path in present if path.suffix.lower() in OTHER_PICTURES)
    count = f"{len(videos)} videos are" if len(videos) > 1 else "1 video is"
    notes = [f"{name}: {count} left out: {how_to_split(str(videos[0]))}"] if videos else []
    if others:
        counts = ", ".join(f"{count} {ending}" for ending, count in sorted(others.items()))
        notes.append(f"{name}: {counts} are left out: make JPEG or PNG of them, or name them to try them")
    if drawn:
        where = min(drawn).parent
        notes.append(f"{name}: annotated pictures of earlier calls are left out ({len(drawn)}, as in {where})")
    return notes


def how_to_split(video: str) -> str:
    """The line that makes pictures of a video or stream."""
    rate = " -vf fps=1" if URL.match(video) else ""
    return f"make pictures of it first: mkdir frames; ffmpeg -i {shlex.quote(video)}{rate} frames/%06d.jpg"


def what_url(url: str, scheme: str) -> str:
    """What to do about a URL: nothing is downloaded here."""
    quoted = shlex.quote(url)
    if scheme in STREAMS:
        return f"a stream: {how_to_split(url)}"
    if scheme == "file":
        return f"a URL: give the path alone: {url[len('file://') :]}"
    if scheme == "s3":
        way = f"aws s3 cp {quoted} ."
    elif scheme == "gs":
        way = f"gcloud storage cp {quoted} ."
    elif scheme in ("http", "https", "ftp", "ftps", "sftp"):
        way = f"curl -L -O {quoted}"
    else:
        return "a URL: download it first and name the file"
    file = url.partition("?")[0].rpartition("/")[2]
    if Path(file).suffix.lower() in VIDEOS:
        return f"a video's URL: download it ({way}), then {how_to_split(file)}"
    return f"a URL: download it first and name the file: {way}"


def _real(path: Path) -> Path:
    """The path without symbolic links; for circular links `Path.resolve` raises on older Pythons."""
    return Path(os.path.realpath(path))


def _why_none(name: str, leave_out: Path) -> str:
    if not os.path.isdir(name):
        if url := URL.match(name):
            return what_url(name, url[1].lower())
        return "no such file, nor does a file match it as a pattern"
    if _real(leave_out) in (_real(Path(name)), *_real(Path(name)).parents):
        return "the folder of the results (--out), whose pictures are left out: give another one, or name the files"
    if videos := sorted(p for p in Path(name).rglob("*") if p.suffix.lower() in VIDEOS):
        return f"no picture in this folder, but videos: {how_to_split(str(videos[0]))}"
    if any(earlier_pictures(p.parent) for p in Path(name).rglob(JSON_FILE)):
        return "no picture in this folder but those that earlier calls annotated; to use them, name the files"
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


def check_free(folder: Path, overwrite: bool) -> None:
    """Refuse a folder for results where another call's are.

    Raises:
        UserError: it is no folder, `detections.json` is no file there, or it is one and `overwrite` is not asked for.
    """
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise UserError(f"--out {folder}: is a file: give a folder")
    results = folder / JSON_FILE
    if os.path.exists(results) and not os.path.isfile(results):
        raise UserError(f"{results}: is not a regular file, so the results cannot be written there: give another --out")
    if os.path.lexists(results) and not overwrite:
        raise UserError(f"--out {folder}: holds {_whose(results)}: give another --out, or --overwrite to replace them")


def _whose(results: Path) -> str:
    """Whose results a `detections.json` lists."""
    try:
        content = json.loads(results.read_text("utf-8"))
        files = [str(entry["file"]) for entry in content["pictures"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"a {JSON_FILE} of unknown origin"
    found_by = f" by {content['checkpoint']}" if isinstance(content.get("checkpoint"), str) else ""
    first = f", the first {files[0][:200]}" if files else ""
    return f"another call's results{found_by} ({len(files)} picture{'s' if len(files) != 1 else ''}{first})"


def write_results(folder: Path, results: Results, files: Sequence[Path]) -> None:
    """Write `detections.json`, and remove annotated pictures that only the file it replaces lists.

    Args:
        files: the pictures that were read; none of them is removed.
    """
    kept = {entry["picture"] for entry in results["pictures"]} | {file.name for file in files}
    earlier = [folder / name for name in earlier_pictures(folder) if name not in kept]
    write_json(folder / JSON_FILE, results)
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
