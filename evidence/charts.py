"""The charts of docs/evidence.md, drawn from records; each holds the hash of what it was drawn from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from paired import Effect, paired, sample, student
from PIL import Image
from reading import BASE, Record, Seeds, changed, crossing, of_heads, over_windows, rois, steps
from views import WORDS, kinds_of

COLOURS = {
    "fc": "#1f77b4", "conv": "#d62728", "double_fc": "#17becf", "double_head": "#2ca02c", "double_head_ext": "#9467bd",
}  # fmt: skip
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
            panel.plot(points, means, color=COLOURS[kind], linewidth=2, label=f"{WORDS[kind]}, {len(curves)} seeds")
    late = [loss for run in record["runs"] for step, loss in run["loss"] if step > 0.6 * last]
    axes[0].set(xlabel="step", ylabel="loss", title="whole training")
    axes[1].set(
        xlabel="step", xlim=(0.6 * last, last), ylim=(0.97 * min(late), 1.03 * max(late)), title="its last part"
    )
    axes[0].legend(frameon=False)
    return figure


def curves(record: Record) -> Figure:
    """AP, AP75 and the IoU of regressed boxes by RoIs seen, mean and standard deviation over seeds."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), constrained_layout=True)
    chosen = [kind for kind in COLOURS if kind in kinds_of(record)]
    for panel, metric in zip(axes, ("AP", "AP75"), strict=False):
        for kind in chosen:
            _curve(panel, record, lambda step, k=kind, m=metric: of_heads(record, k, m, step=step), COLOURS[kind],
                   WORDS[kind])  # fmt: skip
        _crossing(panel, record, *(lambda step, k=kind, m=metric: of_heads(record, k, m, step=step)
                                   for kind in ("double_head", "fc")))  # fmt: skip
        panel.set_title(f"{metric}; dotted: Double-Head crosses single fc")
    for head, colour, style in (
        ("fc: both", COLOURS["fc"], "-"), ("fc: boxes", COLOURS["fc"], "--"),
        ("conv: both", COLOURS["conv"], "-"), ("conv: boxes", COLOURS["conv"], "--"),
    ):  # fmt: skip
        _curve(axes[2], record, lambda step, h=head: _iou(record, h, step), colour, head, style)
    _crossing(
        axes[2], record, lambda step: _iou(record, "conv: boxes", step), lambda step: _iou(record, "fc: boxes", step)
    )
    axes[2].set_title("IoU of regressed boxes, windows of 0.5 or more")
    for panel in axes:
        panel.set(xlabel="RoIs seen", xscale="log")
        panel.legend(frameon=False, fontsize=8)
    return figure


def _iou(record: Record, head: str, step: int) -> Seeds:
    return over_windows(record, head, "regressed_iou", 0.5, 1.0, step=step)


def _curve(panel: Any, record: Record, get: Callable[[int], Seeds], colour: str, label: str, style: str = "-") -> None:
    points = [(rois(record, step), sample(list(values.values()))) for step in steps(record) if (values := get(step))]
    panel.errorbar([seen for seen, _ in points], [one.mean for _, one in points], [one.std or 0.0 for _, one in points],
                   color=colour, linestyle=style, marker="o", markersize=3, capsize=3, label=label)  # fmt: skip


def _crossing(panel: Any, record: Record, ours: Callable[[int], Seeds], theirs: Callable[[int], Seeds]) -> None:
    at = crossing(record, ours, theirs)
    if at is not None:
        panel.axvline(at, color="black", linestyle=":")


def factors(record: Record) -> Figure:
    """Double-Head - single fc for each factor, with standard errors (thick) and 95 % intervals (thin)."""
    rows: list[tuple[str, Effect]] = []
    for variant in record["variants"]:
        found = paired(*(changed(record, variant, kind, "AP") for kind in ("double_head", "fc")))
        if found is not None:
            rows.append((variant.replace("model.", "").replace("train.", ""), found))
    figure, panel = plt.subplots(figsize=(9, 1.2 + 0.42 * len(rows)), constrained_layout=True)
    for place, (name, found) in enumerate(rows):
        colour = "black" if name == BASE else "#2ca02c"
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
    "heads-curves": Chart("heads-shapes", CURVES, curves),
    "heads-bccd-curves": Chart("heads-bccd", CURVES, curves),
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
