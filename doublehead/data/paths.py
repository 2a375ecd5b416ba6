"""Checks file names from annotations: they must stay in the data set's folder and name regular files."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ..errors import DataError


def check_inside(name: str, where: str, outside_root: bool) -> None:
    """Refuse a name that leads out of its folder: an absolute path, or one with `..`.

    Annotations are not trusted to choose which files of this machine are read.  Only the text is checked: a folder of
    images that is a symbolic link is the user's own choice and is followed.

    Raises:
        DataError: such a name, unless `outside_root`.
    """
    path = Path(name)
    if outside_root or not (path.anchor or ".." in path.parts):
        return
    kind = "is an absolute path" if path.anchor else "has '..' in it"
    raise DataError(f"{where}: {name[:200]!r} {kind}, which may lead out of the data set's folder; if it is meant, "
                    "allow it with outside_root=True (--data.outside-root)", "path outside of the data")  # fmt: skip


MISSING = {"image": "missing image", "annotation": "missing annotation file"}


def check_regular(path: str | Path, what: str) -> None:
    """Refuse a path that is not a regular file, before it is opened: reading a pipe or a device may block forever.

    Raises:
        DataError: it is not a regular file, or does not exist.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such {what} file", MISSING[what]) from error
    except (OSError, ValueError) as error:  # a loop of links, no permission, a name that is too long or has a zero byte
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot read this {what}: {reason}", f"unreadable {what}") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        message = f"{path}: cannot read this {what}: it is {kind}; regular files are accepted"
        raise DataError(message, f"unreadable {what}")
