"""Figures 2 and 7: classification scores and regressed boxes' IoUs over the IoUs of sliding windows.

Every object has 14,161 windows (see `windows`), each with the object's class.  They are grouped into 20 bins by their
IoU with the object.  For each bin and group of objects, the figure shows the mean and (population) standard deviation
of the class's score, and of the object's IoU with the window after regression.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from doublehead.analysis.groups import SIZES
from doublehead.analysis.moments import Moments, MomentTable
from doublehead.analysis.options import SlidingWindows
from doublehead.analysis.output import save_figure, write_csv
from doublehead.analysis.readers import ImageFeatures, Reader, shared_features
from doublehead.analysis.study import Study, open_study
from doublehead.analysis.windows import BINS, ObjectWindows, iou_bins, object_windows
from doublehead.data import Target
from doublehead.engine.distributed import World
from doublehead.engine.logs import say
from doublehead.ops import box_iou

FIGURE = "sliding-windows"
COLUMNS = ("head", "group", "bin low", "bin high", "windows", "score mean", "score std", "iou mean", "iou std")
STYLES = [("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"), ("-", "v"), ("--", "x"), (":", "+"), ("-.", "*")]
"""Line style and marker of each head, to tell them apart without colours."""


class Curve(NamedTuple):
    """One head's statistics for one group."""

    head: str
    group: str
    bins: list[Moments]
    """Moments of each bin: x is the score, y the regressed box's IoU."""


def run(options: SlidingWindows, world: World) -> None:
    """Draw the figure; see `SlidingWindows`.

    Raises:
        UserError: an option is invalid (see `open_study`), or `out` holds the state of another measurement.
        DataError: the data cannot be used.
    """
    study = open_study(FIGURE, options, world)
    table = study.measure(measure_image, options, _shape(study), world)
    world.on_main(lambda: write_results(study, table))


def measure_image(study: Study, options: SlidingWindows, image: Tensor, target: Target) -> tuple[MomentTable, int]:
    """Moments of an image's windows for all heads, by (head, class, size, bin), and the number of RoIs read."""
    table = MomentTable(_shape(study))
    windows = object_windows(image, target, options.seed)
    if len(windows.boxes) == 0:
        return table, 0
    labels = target["labels"].to(image.device)[windows.objects]
    sizes = study.sizes[target["image_id"]].to(image.device)[windows.objects]
    cells = (labels - 1, sizes, iou_bins(windows.ious))
    for head, (reader, features) in enumerate(
        zip(study.readers, shared_features(study.readers, image, target["boxes"]), strict=True)
    ):
        scores, ious = read_windows(reader, features, target["boxes"], windows, labels, options.chunk)
        table.add((head, *cells), scores, ious)
    return table, len(study.readers) * len(labels)


def read_windows(
    reader: Reader, features: ImageFeatures, objects: Tensor, windows: ObjectWindows, labels: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """The score of each window's class in `labels` [K], and its object's IoU with the regressed box: `Tensor[K]` each.

    IoUs are computed in the image's pixels, like those of the windows with the objects `Tensor[G, 4]`.
    """
    scores, moved = reader.read_all(features, reader.rois(features, windows.boxes), labels, chunk)
    truth = objects.to(moved.device)[windows.objects]
    return scores, box_iou(features.into_image(moved)[:, None], truth[:, None])[:, 0, 0].clamp(0, 1)


def write_results(study: Study, table: MomentTable) -> None:
    """Write `sliding-windows.csv` and `sliding-windows.png`, and print which groups are empty."""
    curves = [
        Curve(reader.name, group.name, [table.total(head, group.classes, _sized(group.sizes), b) for b in range(BINS)])
        for head, reader in enumerate(study.readers)
        for group in study.groups
    ]
    for curve in curves[: len(study.groups)]:  # all heads share the windows
        if not any(moments.count for moments in curve.bins):
            say(f"{curve.group}: no objects, so nothing is drawn")
    write_csv(study.folder / f"{FIGURE}.csv", COLUMNS, (row for curve in curves for row in _rows(curve)))
    draw(
        study.folder / f"{FIGURE}.png", curves, f"Sliding windows, {len(study.dataset)} images of {study.dataset.name}"
    )
    say(f"{study.folder}: {FIGURE}.csv, {FIGURE}.png")


def draw(path: Path, curves: Sequence[Curve], title: str) -> None:
    """Scores in the upper row, regressed boxes' IoUs in the lower; a column for each group."""
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys(curve.group for curve in curves))
    heads = list(dict.fromkeys(curve.head for curve in curves))
    figure = Figure(figsize=(2.7 * len(groups) + 1, 6.6), layout="constrained")
    rows = figure.subplots(2, len(groups), sharex=True, sharey="row", squeeze=False)
    for axes in rows[1]:
        axes.plot([0, 1], [0, 1], color="0.6", lw=1, zorder=0, label="unmoved" if axes is rows[1][0] else None)
    for column, group in enumerate(groups):
        for curve in (curve for curve in curves if curve.group == group):
            _draw_curve(rows[:, column], curve, heads.index(curve.head), shade=0.3 / max(2, len(heads)))
        if not any(moments.count for curve in curves if curve.group == group for moments in curve.bins):
            for axes in rows[:, column]:
                axes.text(0.5, 0.5, "no objects", ha="center", va="center", backgroundcolor="white")
        rows[0, column].set(title=group, xlim=(0, 1), ylim=(0, 1))
        rows[1, column].set(xlabel="window's IoU", ylim=(0, 1))
    rows[0, 0].set_ylabel("score of the object's class")
    rows[1, 0].set_ylabel("regressed box's IoU")
    for axes in rows.flat:
        axes.grid(alpha=0.3)
    figure.suptitle(f"{title}\nmean and standard deviation of {BINS} bins of the windows' IoU with their object")
    figure.legend(*rows[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    save_figure(path, figure)


def _draw_curve(axes: Any, curve: Curve, number: int, shade: float) -> None:
    line, marker = STYLES[number % len(STYLES)]
    centres = [(b + 0.5) / BINS for b in range(BINS)]
    for panel, means, spreads in (
        (axes[0], [moments.x_mean for moments in curve.bins], [moments.x_std for moments in curve.bins]),
        (axes[1], [moments.y_mean for moments in curve.bins], [moments.y_std for moments in curve.bins]),
    ):
        pairs = [(math.nan, math.nan) if m is None else (m, s) for m, s in zip(means, spreads, strict=True)]
        means = [mean for mean, _ in pairs]
        panel.plot(centres, means, line, color=f"C{number}", marker=marker, ms=4, lw=1.5, label=curve.head)
        low, high = [m - s for m, s in pairs], [m + s for m, s in pairs]
        panel.fill_between(centres, low, high, color=f"C{number}", alpha=shade, lw=0)


def _rows(curve: Curve) -> list[tuple]:
    return [
        (curve.head, curve.group, b / BINS, (b + 1) / BINS, m.count, m.x_mean, m.x_std, m.y_mean, m.y_std)
        for b, m in enumerate(curve.bins)
    ]


def _shape(study: Study) -> tuple[int, ...]:
    return len(study.readers), len(study.dataset.classes), len(SIZES), BINS


def _sized(sizes: Sequence[int]) -> list[int]:
    return [size for size in sizes if size < len(SIZES)]  # every window has an object
