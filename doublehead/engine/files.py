"""Atomic writing of files, and run folders that are never overwritten."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import secrets
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from doublehead.config import Recipe, from_dict
from doublehead.engine.lock import LOCK_FILE
from doublehead.errors import UserError

RECIPE_FILE = "recipe.json"
UNSAVED_MARK = ".unsaved"
"""Marks a run's folder until its first state is saved: a model without a state is then from an interrupted save, not
one that somebody wants to keep.  It is written before the recipe."""
_LONGEST = 200  # bytes of a file's name that its temporary file repeats
_A_DAY = 24 * 3600.0
_WRITER = re.compile(r"^\..*\.(?P<system>[0-9a-f]{8})-(?P<process>[0-9]+)-[0-9a-f]{8}\.tmp$", re.DOTALL)
_next_scan: dict[Path, float] = {}  # folder -> monotonic time of the next search for abandoned files


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well it takes `path`'s place.

    The content reaches the disk before the name does, so a crash or power cut leaves either the
    old file or the new one.  If the block fails the old file stays and the temporary one goes.
    Of several processes or threads that write the same file at once each has a temporary file of
    its own, and the last one's stays, whole.  What killed processes left in the folder is removed
    (see `is_left_behind`).  A device or a pipe, such as /dev/stdout, is written to as it is.
    """
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        try:
            yield path
        except OSError as error:
            error.filename = error.filename or str(path)
            raise
        return
    temporary = path.with_name(_temporary_name(path.name))
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        with contextlib.suppress(OSError):  # a failed clean-up must not lose the file
            path.with_name(f".{path.name}.tmp").unlink(missing_ok=True)  # of earlier versions, which all had this name
            _remove_abandoned(path.parent, now=temporary.stat().st_mtime)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, str(temporary)):
            error.filename = str(path)  # a write that fails names no file, and nobody knows the temporary one
        raise
    _sync_folder(path.parent)


def _temporary_name(name: str) -> str:
    """`.NAME.SYSTEM-PROCESS-RANDOM.tmp`: hidden, nobody else's, and it tells who writes it."""
    short = os.fsencode(name)[:_LONGEST].decode("utf-8", "ignore")  # with all the rest, at most 255 bytes
    return f".{short}.{this_system()}-{os.getpid()}-{secrets.token_hex(4)}.tmp"


@functools.cache
def this_system() -> str:
    """8 hex digits, equal for processes that share process ids: one container, one machine since its last start."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        seen = boot + os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux
        seen = f"{platform.node()} {uuid.getnode()}"
    return hashlib.sha256(seen.encode()).hexdigest()[:8]


def is_temporary(path: Path) -> bool:
    """Whether this is a name of a temporary file of `replacing`, an earlier version's included."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def is_left_behind(path: Path, now: float) -> bool:
    """Whether `path` is a temporary file of `replacing` whose writer is gone.

    That is so if the writer was a process of this system that no longer runs.  Nothing is known about writers on other
    systems (a machine that shares the folder, another container, this machine before a restart): their files are left
    for a day after the last change.

    Args:
        now: seconds, by the clock of the file system.
    """
    writer = _WRITER.search(path.name)
    if writer is None:
        return False
    system, process = writer["system"], int(writer["process"])
    if system == this_system() and os.name == "posix" and not _runs(process):
        return True
    return now - path.stat().st_mtime > _A_DAY


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def _remove_abandoned(folder: Path, now: float) -> None:
    """Remove what killed processes left in `folder`.

    A folder may hold very many files: scans are rare enough to take at most a twentieth of the time.
    """
    begun = time.monotonic()
    if begun < _next_scan.get(folder, 0):
        return
    with os.scandir(folder) as entries:
        temporary = [Path(entry.path) for entry in entries if entry.name.endswith(".tmp") and entry.name[0] == "."]
    for path in temporary:
        with contextlib.suppress(OSError):  # another process removed it, or it is another user's
            if is_left_behind(path, now):
                path.unlink()
    ended = time.monotonic()
    _next_scan[folder] = ended + 20 * (ended - begun)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_room(path: Path, size: int = 1 << 20) -> None:
    """Find out why PyTorch could not write `path`: on a full disk its zip writer only says "unexpected pos".

    Appends `size` bytes to the file, which is useless already.

    Raises:
        OSError: the disk is full, or what else prevents writing.
    """
    with open(path, "ab", buffering=0) as file:
        while size > 0:
            size -= file.write(bytes(size))


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write `content` to `path` atomically.

    Used for pictures: Pillow does not notice in every format that the disk is full.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)


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
    """Refuse a folder that holds files, other than those of a run that was killed before it began.

    Raises:
        UserError: it does.
    """
    if any(path.name not in (LOCK_FILE, UNSAVED_MARK) and not is_temporary(path) for path in folder.iterdir()):
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
        return _read_recipe(path)
    except OSError as error:
        raise UserError(f"{folder} is not the folder of a run: {path} cannot be read ({error.strerror})") from error


def read_recipe_file(path: str | Path) -> Recipe:
    """The recipe in a file, or in the folder of a run.

    Raises:
        UserError: there is none; what is wrong in it is named by its field.
    """
    path = Path(path)
    path = path / RECIPE_FILE if path.is_dir() else path
    try:
        return _read_recipe(path)
    except OSError as error:
        raise UserError(f"--recipe {path}: cannot be read: {error.strerror}") from error


def _read_recipe(path: Path) -> Recipe:
    """Raises OSError: it cannot be read; UserError: it holds no recipe."""
    if path.exists() and not path.is_file():  # reading a pipe would wait forever
        raise UserError(f"{path}: not a regular file")
    try:
        return from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:  # of characters, JSON, fields
        raise UserError(f"{path}: not a recipe of this version: {error}") from error
