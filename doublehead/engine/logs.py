"""Output of a training: a JSONL log, TensorBoard events, lines on the terminal, counted warnings."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from doublehead.engine.events import EventFile
from doublehead.engine.files import replacing, write_text
from doublehead.errors import UserError

LOG_FILE = "log.jsonl"
BOARD_FOLDER = "tensorboard"
Record = dict[str, Any]


def read_log(path: str | Path) -> list[Record]:
    """The records of a JSONL log; a last line truncated by a killed process is left out.

    Raises:
        UserError: a line before the last is not a record.
    """
    records, foreign = _parse_log(Path(path).read_bytes())
    if foreign:
        number, reason = foreign[0]
        raise UserError(f"{path}, line {number}: not a record of a training ({reason})")
    return records


def _parse_log(data: bytes) -> tuple[list[Record], list[tuple[int, str]]]:
    """The records, and number and defect of every other line; a truncated last line is neither."""
    lines = data.splitlines()
    records, foreign = [], []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            reason = _defect(record)
        except (ValueError, RecursionError) as error:  # of bytes that are not UTF-8 too
            if number == len(lines) and not data.endswith(b"\n"):
                break
            reason = f"not JSON: {error}"
        if reason:
            foreign.append((number, reason))
        else:
            records.append(record)
    return records, foreign


def _defect(record: Any) -> str | None:
    """Why a JSON value is no record; None: it is one."""
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return "not an object with a step"
    for name, value in record.items():
        if type(value) not in (int, float) and not (value is None and name.startswith("A")):
            return f"{name} is not a number"
    missing = {"loss": "lr", "AP": "AP50"}
    return next((f"{one} without {two}" for one, two in missing.items() if one in record and two not in record), None)


def check_log(folder: Path) -> None:
    """Refuse a folder in which a log cannot be written because something else has its name.

    Raises:
        UserError: names what is in the way.
    """
    if (path := folder / LOG_FILE).exists() and not path.is_file():
        raise UserError(f"{path} is not a file, but the run's log is written there: move it away")
    if (path := folder / BOARD_FOLDER).exists() and not path.is_dir():
        raise UserError(f"{path} is not a folder, but TensorBoard's events are written there: move it away")


class RunLog:
    """Appends records to `log.jsonl` and to TensorBoard, each at once.

    Args:
        folder: the run's folder.
        keep: which records of an earlier part of the run to keep: a resumed run forgets those
            later than its checkpoint, so none appears twice.  `step` is where it goes on.

    Raises:
        UserError: a file cannot be written (disk full, no permission); so does `write`.
    """

    def __init__(self, folder: Path, step: int = 0, keep: Callable[[Record], bool] = lambda record: False) -> None:
        self.path = folder / LOG_FILE
        check_log(folder)
        kept = [record for record in self._earlier() if keep(record)]
        with _writing(self.path):
            write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed in `close`)
        with _writing(folder / BOARD_FOLDER):
            self._board = EventFile(folder / BOARD_FOLDER, step + 1)

    def write(self, record: Record) -> None:
        """Append one record, and its numbers as TensorBoard scalars."""
        numbers = {_board_name(k): v for k, v in record.items() if k not in ("step", "time") and v is not None}
        with _writing(self.path):
            line = (json.dumps(record) + "\n").encode()
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with _writing(self._board.path):
            self._board.write(record["step"], numbers)

    def close(self) -> None:
        """Close both files."""
        self._file.close()
        self._board.close()

    def _earlier(self) -> list[Record]:
        """The records of the earlier part; a log with other lines is copied first."""
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        records, foreign = _parse_log(data)
        if foreign:
            number, reason = foreign[0]
            copy = _free_name(self.path)
            with _writing(copy), replacing(copy) as temporary:
                temporary.write_bytes(data)
            say(
                f"note: {self.path}: {len(foreign)} lines that are no records are left out, the first is line {number} "
                f"({reason}); {copy.name} keeps the log as it was"
            )
        return records


def _free_name(path: Path) -> Path:
    number = 1
    while (copy := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    return copy


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror}; checkpoints are untouched, --resume goes on from the last"
        ) from error


def _board_name(name: str) -> str:
    if name == "images_per_second":
        return f"speed/{name}"
    return f"val/{name}" if name.startswith("A") else f"train/{name}"


def say(text: str = "") -> None:
    """Print a line above any progress bar."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


@contextlib.contextmanager
def counted_warnings(shown: bool = True) -> Iterator[Counter]:
    """Inside, each kind of Python warning is printed once, in one line, and counted.

    Yields the counts; at the end those that came more than once are summed up in a line.
    """
    counts: Counter = Counter()

    def count(message, category, filename, lineno, file=None, line=None) -> None:
        text = f"{category.__name__}: {' '.join(str(message).split())}"
        counts[text] += 1
        if shown and counts[text] == 1:
            tqdm.write(f"warning: {text}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", ImportWarning)
        warnings.simplefilter("ignore", ResourceWarning)
        # Pillow's warning about large images: `max_pixels` is the limit here.
        warnings.filterwarnings("ignore", message=r"Image size .* decompression bomb")
        warnings.showwarning = count
        yield counts
    repeated = {text: number for text, number in counts.items() if number > 1}
    for text, number in repeated.items() if shown else ():
        tqdm.write(f"warning: {number} times: {text}", file=sys.stderr)
