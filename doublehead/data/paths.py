"""File names out of annotations: they stay in the folder of the data set."""

from __future__ import annotations

from pathlib import Path

from .dataset import DataError


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
