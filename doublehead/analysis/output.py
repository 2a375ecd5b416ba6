"""Writes the results of an analysis: CSV and PNG files, each atomically."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from doublehead.engine.distributed import World
from doublehead.engine.files import write_bytes, write_text
from doublehead.errors import UserError


def output_folder(path: str, world: World) -> Path:
    """Create the folder unless it exists.

    Raises:
        UserError: it cannot be created or is not writable.
    """

    def make() -> Path:
        folder = Path(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {path}: cannot be made: {error.strerror}") from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"--out {path}: is not writable")
        return folder

    return world.on_main(make)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table; None and NaN become empty fields."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow("" if value is None or value != value else value for value in row)
    write_text(path, text.getvalue())


def save_figure(path: Path, figure: Any) -> None:
    """Write a matplotlib figure as PNG and close it."""
    import matplotlib.pyplot as plt

    memory = io.BytesIO()
    figure.savefig(memory, format="png", dpi=130, bbox_inches="tight")
    plt.close(figure)
    write_bytes(path, memory.getvalue())
