"""Files that are either whole or absent, and run folders that are never overwritten."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from doublehead.config import Recipe, from_dict
from doublehead.engine.errors import UserError
from doublehead.engine.lock import LOCK_FILE

RECIPE_FILE = "recipe.json"
_LEFT_BEHIND = (LOCK_FILE, f".{RECIPE_FILE}.tmp")  # by a run that was killed before it began


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well it takes `path`'s place.

    The content reaches the disk before the name does, so a crash or power cut leaves either the
    old file or the new one.  If the block fails the old file stays and the temporary one goes.
    The temporary name is fixed: what a killed process left behind is overwritten by the next.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any, indent: int | None = 2) -> None:
    """Write `value` as JSON to `path` atomically; NaN is refused, as JSON has none."""
    write_text(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


def new_run_folder(name: str, out: str | Path | None = None, root: str | Path = "runs") -> Path:
    """Create the folder of a new run: `out`, or the first free `<root>/<name>-<n>`.

    Raises:
        UserError: `out` exists and is not an empty folder, or the folder cannot be made.
    """
    try:
        if out is None:
            return _first_free(Path(root), name)
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        check_new(folder)
    except OSError as error:
        raise UserError(f"cannot create the run folder {error.filename or out}: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"the run folder {folder} is not writable")
    return folder


def check_new(folder: Path) -> None:
    """Refuse a folder that holds files of anyone.

    Raises:
        UserError: it does.
    """
    if any(path.name not in _LEFT_BEHIND for path in folder.iterdir()):
        raise UserError(f"{folder} already holds files: give another --out, or continue it with --resume {folder}")


def _first_free(root: Path, name: str) -> Path:
    number = 1
    while True:
        folder = root / f"{name}-{number}"
        try:
            folder.mkdir(parents=True)  # atomic: of two runs started together, one gets the next number
            return folder
        except FileExistsError:
            number += 1


def read_recipe(folder: str | Path) -> Recipe:
    """The recipe of an earlier run.

    Raises:
        UserError: `folder` is not the folder of a run, or its recipe is of another version.
    """
    path = Path(folder) / RECIPE_FILE
    try:
        return from_dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{folder} is not the folder of a run: {path} cannot be read ({error.strerror})") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not a recipe of this version: {error}") from error
