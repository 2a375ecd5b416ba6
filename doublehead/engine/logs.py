"""What a training says: a JSONL log, TensorBoard events, a progress line, counted warnings."""

from __future__ import annotations

import contextlib
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from doublehead.engine.errors import UserError
from doublehead.engine.files import write_text

LOG_FILE = "log.jsonl"
Record = dict[str, Any]


def read_log(path: str | Path) -> list[Record]:
    """The records of a JSONL log; a last line cut short by a killed process is left out.

    Raises:
        UserError: a line before the last is not JSON.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(f"{path}, line {number}: not JSON ({error})") from error
    return records


class RunLog:
    """Appends records to `log.jsonl` and to TensorBoard.

    Args:
        folder: the run's folder.
        keep: which records of an earlier part of the run to keep: a resumed run forgets those
            later than its checkpoint, so none appears twice.  `step` is where it goes on.
    """

    def __init__(self, folder: Path, step: int = 0, keep: Callable[[Record], bool] = lambda record: False) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.path = folder / LOG_FILE
        kept = [record for record in read_log(self.path) if keep(record)] if self.path.exists() else []
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = open(self.path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (closed in `close`)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, record: Record) -> None:
        """Append one record; its numbers go to TensorBoard as scalars too."""
        self._file.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if name not in ("step", "time") and value is not None:
                self._board.add_scalar(_board_name(name), value, record["step"])

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        self._board.close()


def _board_name(name: str) -> str:
    if name == "images_per_second":
        return f"speed/{name}"
    return f"val/{name}" if name.startswith("A") else f"train/{name}"


class Progress:
    """A progress bar on a terminal; elsewhere (a file, a CI log) a plain line now and then."""

    def __init__(self, total: int, done: int, shown: bool, every: float = 15.0) -> None:
        self._bar = tqdm(total=total, initial=done, unit="step", disable=None if shown else True, dynamic_ncols=True)
        self._plain = shown and self._bar.disable
        self._total, self._first, self._step, self._every = total, done, done, every
        self._begun = self._last = time.monotonic()

    def advance(self) -> None:
        """One more step is done."""
        self._step += 1
        self._bar.update()

    def show(self, record: Record) -> None:
        """Show the losses of a log record."""
        parts = {"loss": record["loss"]} | {k[5:]: v for k, v in record.items() if k.startswith("loss_")}
        text = " ".join(f"{name} {value:.3g}" for name, value in parts.items())
        self._bar.set_postfix_str(text, refresh=False)
        now = time.monotonic()
        if self._plain and (now - self._last >= self._every or self._step == self._total):
            self._last = now
            left = (now - self._begun) / max(1, self._step - self._first) * (self._total - self._step)
            say(f"step {self._step}/{self._total}  {text}  {_clock(left)} left")

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


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
        # Pillow's, of images of many pixels: they are held against `max_pixels`.
        warnings.filterwarnings("ignore", message=r"Image size .* decompression bomb")
        warnings.showwarning = count
        yield counts
    repeated = {text: number for text, number in counts.items() if number > 1}
    for text, number in repeated.items() if shown else ():
        tqdm.write(f"warning: {number} times: {text}", file=sys.stderr)
