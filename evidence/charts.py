"""The charts of docs/evidence.md, drawn from records; each holds the hash of what it was drawn from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from factors import words
from matplotlib.figure import Figure
from paired import Effect, paired, student
from PIL import Image
from reading import Record, changed
from views import kinds_of

from doublehead.analysis.heads.curves import COLOURS, WORDS, learning_curves
from doublehead.analysis.heads.specs import BASE

KEY = "Source"
"""The PNG text that holds the hash."""


def losses(record: Record) -> Figure:
    """The loss of every training: seeds thin, each kind's mean thick; the second panel begins where the rate drops."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    last = max(run["step"] for run in record["runs"])
    for kind in kinds_of(record):
        curves = [dict(map(tuple, run["loss"])) for run in record["runs"] if run["kind"] == kind]
        points = sorted(set.intersection(*(set(curve) for curve in curves)))
        means = [fmean(curve[step] for curve in curves) for step in points]
        for panel in axes:
            for curve in curves:
                panel.plot(curve.keys(), curve.values(), color=COLOURS[kind], alpha=0.3, linewidth=0.8)
            panel.plot(
                points,
                means,
                color=COLOURS[kind],
                linewidth=2,
                label=f"{WORDS[kind]}, {len(curves)} seed{'s' * (len(curves) > 1)}",
            )
    late = [loss for run in record["runs"] for step, loss in run["loss"] if step > 0.6 * last]
    axes[0].set(xlabel="step", ylabel="loss", title="whole training")
    axes[1].set(
        xlabel="step", xlim=(0.6 * last, last), ylim=(0.97 * min(late), 1.03 * max(late)), title="its last part"
    )
    axes[0].legend(frameon=False)
    return figure


def factors(record: Record) -> Figure:
    """Double-Head - single fc for each factor, with standard errors (thick) and 95 % intervals (thin)."""
    rows: list[tuple[str, Effect]] = []
    for variant in record["variants"]:
        found = paired(*(changed(record, variant, kind, "AP") for kind in ("double_head", "fc")))
        if found is not None:
            rows.append((words(variant), found))
    figure, panel = plt.subplots(figsize=(9, 1.2 + 0.42 * len(rows)), constrained_layout=True)
    for place, (name, found) in enumerate(rows):
        colour = "black" if name == words(BASE) else "#2ca02c"
        if found.error is not None:
            panel.errorbar(found.mean, place, xerr=student(found.count) * found.error, color=colour, linewidth=0.8)
            panel.errorbar(found.mean, place, xerr=found.error, color=colour, linewidth=3)
        panel.plot(found.mean, place, "o", color=colour)
    panel.axvline(0, color="grey", linewidth=0.8)
    panel.set(yticks=range(len(rows)), yticklabels=[name for name, _ in rows], xlabel="AP, Double-Head - single fc",
              title="thick: standard error; thin: 95 %")  # fmt: skip
    panel.invert_yaxis()
    return figure


class Chart(NamedTuple):
    """What is drawn of which record."""

    record: str
    words: str
    figure: Callable[[Record], Figure]


CURVES = "AP, AP75 and IoU of regressed boxes over RoIs seen"
CHARTS = {
    "bccd-loss": Chart("bccd", "the loss of every training", losses),
    "heads-curves": Chart("heads-shapes", CURVES, learning_curves),
    "heads-longer-curves": Chart("heads-longer", CURVES, learning_curves),
    "heads-narrow-curves": Chart("heads-narrow", CURVES, learning_curves),
    "heads-bccd-curves": Chart("heads-bccd", CURVES, learning_curves),
    "factors": Chart("heads-factors", "what Double-Head has more than the single head, by factor", factors),
}
"""File -> chart; those without a record are not drawn."""
FIGURES = {
    "sliding-windows": "scores and IoUs of regressed boxes of sliding windows",
    "sliding-windows-differences": "the differences of heads on sliding windows",
    "pearson": "correlation of scores and IoUs",
    "balance-weights": "AP over the balance weights",
}
"""What `doublehead analyze` has drawn: file -> words; `record.py figure` copies it."""
PICTURES = {name: (chart.words, chart.record) for name, chart in CHARTS.items()} | {
    name: (words, name.removesuffix("-differences")) for name, words in FIGURES.items()
}
"""File -> its words and its record."""


def source(record: Record) -> str:
    """A hash of all that a record holds."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def outdated(folder: Path, records: dict[str, Record]) -> list[str]:
    """The charts that were not drawn from the records that are there now."""
    return [
        name
        for name, chart in CHARTS.items()
        if chart.record in records and drawn_from(folder / f"{name}.png") != source(records[chart.record])
    ]


def drawn_from(path: Path) -> str | None:
    if not path.exists():
        return None
    with Image.open(path) as image:
        return image.text.get(KEY)


def draw(folder: Path, name: str, records: dict[str, Record]) -> None:
    """Write a chart."""
    chart = CHARTS[name]
    folder.mkdir(exist_ok=True)
    figure = chart.figure(records[chart.record])
    figure.savefig(folder / f"{name}.png", dpi=110, metadata={KEY: source(records[chart.record])})
    plt.close(figure)
