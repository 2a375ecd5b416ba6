"""How far a training is: a bar on a terminal, plain lines elsewhere; never wider than 80 columns."""

from __future__ import annotations

import shutil
import time
from typing import Any

from tqdm import tqdm

from doublehead.engine.logs import Record, say

WIDTH = 80
"""Columns of the bar and of the lines, at most; a narrower terminal's width is kept to."""
_SHORTEST_BAR = 5


class Progress:
    """A progress bar on a terminal; elsewhere (a file, a CI log) a plain line every few seconds.

    Both show the total loss, the time left and the images per second; the log has the single losses.
    """

    def __init__(self, total: int, done: int, shown: bool, every: float = 15.0) -> None:
        self._bar = _Bar(total=total, initial=done, disable=None if shown else True, dynamic_ncols=True)
        self._plain = shown and self._bar.disable
        self._total, self._first, self._step, self._every = total, done, done, every
        self._begun = self._last = time.monotonic()

    def advance(self) -> None:
        """One more step is done."""
        self._step += 1
        self._bar.update()

    def show(self, record: Record) -> None:
        """Show what a log record says of the training."""
        self._bar.record = record
        now = time.monotonic()
        if self._plain and (now - self._last >= self._every or self._step == self._total):
            self._last = now
            left = seconds_left(now - self._begun, self._step - self._first, self._total - self._step)
            say(fitting([f"step {self._step}/{self._total}", *facts(record, left)], WIDTH))

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


class _Bar(tqdm):
    """tqdm's bar with a line of our own."""

    record: Record | None = None

    @property
    def format_dict(self) -> dict[str, Any]:
        return super().format_dict | {"record": self.record}

    @staticmethod
    def format_meter(n, total, elapsed, ncols=None, initial=0, ascii=False, record=None, **_) -> str:  # noqa: A002
        """The whole line; tqdm calls it with its state, `format_dict`."""
        width = min(ncols or shutil.get_terminal_size().columns, WIDTH) - 1  # some terminals break a full line
        return bar_line(n, total, facts(record, seconds_left(elapsed, n - initial, total - n)), width, bool(ascii))


def bar_line(step: int, total: int, parts: list[str], width: int, plain: bool = False) -> str:
    """`38%|███     | 92/240, ...` in exactly `width` columns; without room for a bar, the text alone.

    Args:
        plain: for terminals that show ASCII alone.
    """
    text = fitting([f"{step}/{total}", *parts], width)
    share = step / total if total else 1.0
    room = width - len(f"100%|| {text}")
    if room < _SHORTEST_BAR:
        return text
    full = int(share * room)
    bar = ("#" if plain else "\N{FULL BLOCK}") * full + " " * (room - full)
    return f"{int(100 * share):3d}%|{bar}| {text}"


def facts(record: Record | None, left: float | None) -> list[str]:
    """What is shown of a training, the more important first; `record` None: nothing was logged yet."""
    parts = [f"loss {record['loss']:.4g}"] if record else []
    parts += [f"{_clock(left)} left"] if left is not None else []
    parts += [f"{_speed(record['images_per_second'])} images/s"] if record and "images_per_second" in record else []
    return parts


def fitting(parts: list[str], width: int) -> str:
    """The parts as one text of at most `width` columns: what has no room is left out whole, from the end on."""
    kept = len(parts)
    while kept > 1 and len(", ".join(parts[:kept])) > width:
        kept -= 1
    return ", ".join(parts[:kept])[: max(0, width)]


def seconds_left(elapsed: float, done: int, missing: int) -> float | None:
    """By the mean time of the steps so far; None before the first one."""
    return elapsed / done * missing if done > 0 else None


def _speed(images: float) -> str:
    return f"{images:.0f}" if images >= 100 else f"{images:.3g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
