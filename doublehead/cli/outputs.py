"""Where a command's result goes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from doublehead.errors import UserError


def check_output(path: str | None, option: str = "--out", overwrite: bool | None = None) -> None:
    """Refuse an output file that cannot be written, before the work and not after it.

    Args:
        overwrite: False: refuse a file that exists, and name the option; None: the caller has looked.

    Raises:
        UserError: its folder does not exist or is closed, it is a folder itself, or it exists.
    """
    if path is None:
        return
    folder = Path(path).parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or Path(path).is_dir():
        raise UserError(f"{option} {path}: cannot be written: give a file in a folder that exists and is writable")
    if overwrite is False and os.path.isfile(path):  # a device or a pipe takes what comes
        raise UserError(f"{option} {path}: exists: give another file, or --overwrite to replace it")


def same_file(first: str, second: str) -> bool:
    """Whether writing one would overwrite the other; a device, such as /dev/stdout, takes both."""
    same = os.path.realpath(first) == os.path.realpath(second)
    return same and (os.path.isfile(first) or not os.path.exists(first))


def check_folder(path: str | None, names: Iterable[str], option: str, overwrite: bool = False) -> None:
    """Refuse a folder for files of these names that cannot be made or written, or that holds one of them.

    Raises:
        UserError: says why.
    """
    if path is None:
        return
    folder = Path(path)
    closest = folder if folder.exists() else folder.parent
    if not closest.is_dir() or not os.access(closest, os.W_OK | os.X_OK):
        raise UserError(f"{option} {path}: cannot be written: give a writable folder, or one to be made in such")
    there = [name for name in names if (folder / name).exists()]
    if there and not overwrite:
        raise UserError(f"{option} {path}: has {', '.join(there)} already: give another folder, or add --overwrite")
