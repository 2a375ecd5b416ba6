"""File names out of annotations: they stay in the folder of the data set, and are of regular files."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ..errors import DataError


def check_inside(name: str, where: str, outside_root: bool) -> None:
    """Refuse a name that its text leads out of the folder it is looked for in: absolute, or with `..`.

    Annotations come from elsewhere, and must not choose which files of this machine are read.  A folder of images that
    is a symbolic link is the user's own choice and is followed: the check is on the text alone.

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
    """Refuse what is not a regular file, before it is opened: reading a pipe or a device may wait without end.

    Raises:
        DataError: it is none, or is not there.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such {what} file", MISSING[what]) from error
    except (OSError, ValueError) as error:  # a loop of links, no permission, a name too long or with a zero byte
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot read this {what}: {reason}", f"unreadable {what}") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        message = f"{path}: cannot read this {what}: it is {kind}; regular files are accepted"
        raise DataError(message, f"unreadable {what}")
