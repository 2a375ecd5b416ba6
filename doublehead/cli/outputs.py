"""Where a command's result goes."""

from __future__ import annotations

import os
from pathlib import Path

from doublehead.errors import UserError


def check_output(path: str | None, option: str = "--out") -> None:
    """Refuse an output file that cannot be written, before the work and not after it.

    Raises:
        UserError: its folder does not exist or is closed, or it is a folder itself.
    """
    if path is None:
        return
    folder = Path(path).parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or Path(path).is_dir():
        raise UserError(f"{option} {path}: cannot be written: give a file in a folder that exists and is writable")
