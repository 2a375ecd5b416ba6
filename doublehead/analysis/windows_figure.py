"""Draws Figures 2 and 7: curves over the windows' IoU with their object, with standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from doublehead.analysis.jackknife import Estimate
from doublehead.analysis.output import save_figure

STYLES = [("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"), ("-", "v"), ("--", "x"), (":", "+"), ("-.", "*")]
"""Line style and marker of each head, to tell them apart without colours."""


class Point(NamedTuple):
    """One bin of windows."""

    windows: int
    """Their number, for one seed."""
    score: Estimate
    """Mean score of the object's class, or the difference of two heads' means."""
    iou: Estimate
    """Mean IoU of the regressed box, or the difference of two heads' means."""
    score_std: float | None
    """Standard deviation over windows, and seeds; of a difference that of the first head."""
    iou_std: float | None
    seeds: int


class Curve(NamedTuple):
    """One head's statistics for one group, or the differences of two heads."""

    head: str
    minus: str | None
    """The head whose means are subtracted; None: none."""
    group: str
    points: list[Point]
    """One for each bin."""

    @property
    def label(self) -> str:
        return self.head if self.minus is None else f"{self.head} minus {self.minus}"

    @property
    def has_windows(self) -> bool:
        return any(point.windows for point in self.points)


def draw(path: Path, curves: Sequence[Curve], title: str) -> str:
    """Scores in the upper row, regressed boxes' IoUs in the lower, a column for each group; returns the file's name."""
    figure, rows = _panels(curves)
    for axes in rows[1]:
        axes.plot([0, 1], [0, 1], color="0.6", lw=1, zorder=0, label="unmoved" if axes is rows[1][0] else None)
    for axes in rows.flat:
        axes.set(ylim=(0, 1))
    rows[0, 0].set_ylabel("score of the object's class")
    rows[1, 0].set_ylabel("regressed box's IoU")
    _draw_curves(rows, curves)
    return _finish(path, figure, rows, f"{title}\nmean {_errors(curves)}, by the window's own IoU with its object")


def draw_differences(path: Path, curves: Sequence[Curve], title: str) -> str:
    """The same for differences of two heads."""
    figure, rows = _panels(curves)
    for axes in rows.flat:
        axes.axhline(0, color="0.4", lw=1, zorder=0)
    rows[0, 0].set_ylabel("difference of scores")
    rows[1, 0].set_ylabel("difference of regressed boxes' IoUs")
    _draw_curves(rows, curves)
    return _finish(path, figure, rows, f"{title}\ndifference of two heads on the same windows {_errors(curves)}")


def _errors(curves: Sequence[Curve]) -> str:
    seeds = {point.seeds for curve in curves for point in curve.points}
    if seeds == {1}:
        return "± standard error over pictures"
    return f"± standard error over seeds ({', '.join(map(str, sorted(seeds)))})"


def _panels(curves: Sequence[Curve]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys(curve.group for curve in curves))
    figure = Figure(figsize=(2.7 * len(groups) + 1, 6.6), layout="constrained")
    rows = figure.subplots(2, len(groups), sharex=True, sharey="row", squeeze=False)
    for column, group in enumerate(groups):
        rows[0, column].set(title=group, xlim=(0, 1))
        rows[1, column].set(xlabel="window's IoU")
        if not any(curve.has_windows for curve in curves if curve.group == group):
            for axes in rows[:, column]:
                axes.text(
                    0.5, 0.5, "no objects", ha="center", va="center", backgroundcolor="white", transform=axes.transAxes
                )
    for axes in rows.flat:
        axes.grid(alpha=0.3)
    return figure, rows


def _draw_curves(rows: Any, curves: Sequence[Curve]) -> None:
    groups = list(dict.fromkeys(curve.group for curve in curves))
    labels = list(dict.fromkeys(curve.label for curve in curves))
    for curve in curves:
        upper, lower = rows[:, groups.index(curve.group)]
        number = labels.index(curve.label)
        _draw_curve(upper, curve.label, [point.score for point in curve.points], number)
        _draw_curve(lower, curve.label, [point.iou for point in curve.points], number)


def _draw_curve(axes: Any, label: str, estimates: Sequence[Estimate], number: int) -> None:
    line, marker = STYLES[number % len(STYLES)]
    colour = f"C{number}"
    centres = [(b + 0.5) / len(estimates) for b in range(len(estimates))]
    values = [math.nan if one.value is None else one.value for one in estimates]
    errors = [one.shown or 0.0 for one in estimates]  # none: a point without a bar
    axes.plot(centres, values, line, color=colour, marker=marker, ms=3.5, lw=1.3, label=label)
    axes.errorbar(centres, values, errors, fmt="none", ecolor=colour, elinewidth=1.2, capsize=2)


def _finish(path: Path, figure: Any, rows: Any, title: str) -> str:
    figure.suptitle(title)
    figure.legend(*rows[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save_figure(path, figure)
    return path.name
