"""Learning curves in a record of `analyze heads`: numbers by seed and RoIs seen, where two cross, and the picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

from doublehead.analysis.heads.specs import BASE

Record = dict[str, Any]
Seeds = dict[int, float]
"""Seed -> a number."""
Curve = Callable[[int], Mapping[int, float]]
"""Step -> a number by seed."""
COLOURS = {
    "fc": "#1f77b4", "conv": "#d62728", "double_fc": "#17becf", "double_head": "#2ca02c", "double_head_ext": "#9467bd",
}  # fmt: skip
"""Of the kinds that are drawn."""
WORDS = {
    "fc": "single fc", "conv": "single conv", "double_fc": "double-fc", "double_conv": "double-conv",
    "double_head_reverse": "double-head-reverse", "double_head": "Double-Head", "double_head_ext": "Double-Head-Ext",
}  # fmt: skip


def steps(record: Record) -> list[int]:
    """At which heads alone were evaluated."""
    return sorted({one["step"] for one in record["results"]})


def of_heads(
    record: Record, kind: str, metric: str, variant: str = BASE, step: int | None = None,
    readout: str | None = None, fusion: str | None = None,
) -> Seeds:  # fmt: skip
    """AP (or another number) of heads alone, in percent; without read-out and fusion the kind's own."""
    step = record["steps"] if step is None else step
    found: Seeds = {}
    for one in record["results"]:
        fits = (one["variant"], one["kind"], one["step"]) == (variant, kind, step) and one[metric] is not None
        if fits and readout in (None, one["readout"]) and fusion in (None, one["fusion"]):
            found.setdefault(one["seed"], 100 * one[metric])
    return found


def rois(record: Record, step: int) -> int:
    """Seen by the base's heads up to a step; the mean over seeds."""
    return round(fmean(one["rois"] for one in record["results"] if (one["variant"], one["step"]) == (BASE, step)))


def over_windows(
    record: Record, head: str, name: str, low: float, high: float, variant: str = BASE, step: int | None = None
) -> Seeds:
    """The mean of a head's `regressed_iou` or `score` over the bins of the windows' IoU from `low` to `high`.

    Every bin that has windows counts the same.
    """
    step = record["steps"] if step is None else step
    found: Seeds = {}
    for one in record["heads"]:
        if (one["variant"], one["head"], one["step"]) == (variant, head, step):
            number = len(one[name])
            bins = one[name][round(low * number) : round(high * number)]
            values = [value for value in bins if value is not None]
            if values:
                found.setdefault(one["seed"], fmean(values))
    return found


def crossing(record: Record, ours: Curve, theirs: Curve) -> int | None:
    """The RoIs after which the mean of ours - theirs changes its sign for the last time, or None.

    Args:
        record: of `analyze heads`.
        ours, theirs: step -> number by seed.  Between two steps the logarithm of the RoIs is interpolated.
    """
    known = []
    for step in steps(record):
        mine, others = ours(step), theirs(step)
        if seeds := mine.keys() & others.keys():
            known.append((rois(record, step), fmean(mine[seed] - others[seed] for seed in seeds)))
    found = None
    for (before, first), (after, second) in pairwise(known):
        if first * second < 0:
            share = first / (first - second)
            found = round(math.exp(math.log(before) + share * (math.log(after) - math.log(before))))
    return found


def learning_curves(record: Record) -> Any:
    """A matplotlib figure: AP, AP75 and the IoU of regressed boxes by RoIs seen.

    Mean and, with several seeds, standard deviation over seeds.  Dotted: where Double-Head crosses the single fc-head,
    and the conv-head for boxes alone the fc-head for boxes alone.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.2), layout="constrained")
    axes = figure.subplots(1, 3)
    trained = {one["kind"] for one in record["results"] if one["variant"] == BASE}
    for panel, metric in zip(axes, ("AP", "AP75"), strict=False):
        of_kind = {
            kind: lambda step, kind=kind, metric=metric: of_heads(record, kind, metric, step=step)
            for kind in COLOURS
            if kind in trained
        }
        for kind, curve in of_kind.items():
            _draw(panel, record, curve, COLOURS[kind], WORDS[kind])
        crossed = _mark(panel, record, of_kind.get("double_head"), of_kind.get("fc"))
        panel.set(title=f"{metric}; dotted: Double-Head crosses single fc" if crossed else metric)
    of_head = {
        head: lambda step, head=head: over_windows(record, head, "regressed_iou", 0.5, 1.0, step=step)
        for head in ("fc: both", "fc: boxes", "conv: both", "conv: boxes")
    }
    for head, curve in of_head.items():
        _draw(axes[2], record, curve, COLOURS[head.partition(":")[0]], head, "--" if "boxes" in head else "-")
    crossed = _mark(axes[2], record, of_head["conv: boxes"], of_head["fc: boxes"])
    axes[2].set(title="IoU of regressed boxes, windows of 0.5 or more" + "; dotted: they cross" * crossed)
    seen = [rois(record, step) for step in steps(record)]
    for panel in axes:
        panel.set(xlabel="RoIs seen", xscale="log")
        panel.set_xticks(seen, [f"{number:,}" for number in seen], fontsize=8)
        panel.set_xticks([], minor=True)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(frameon=False, fontsize=8)
    return figure


def _draw(panel: Any, record: Record, curve: Curve, colour: str, label: str, style: str = "-") -> None:
    points = [(rois(record, step), list(curve(step).values())) for step in steps(record)]
    points = [(seen, values) for seen, values in points if values]
    if points:
        spread = [stdev(values) if len(values) > 1 else 0.0 for _, values in points]
        panel.errorbar([seen for seen, _ in points], [fmean(values) for _, values in points], spread,
                       color=colour, linestyle=style, marker="o", markersize=3, capsize=3, label=label)  # fmt: skip


def _mark(panel: Any, record: Record, ours: Curve | None, theirs: Curve | None) -> bool:
    """Draw a dotted line where a curve crosses another, and say whether it does."""
    at = None if ours is None or theirs is None else crossing(record, ours, theirs)
    if at is not None:
        panel.axvline(at, color="black", linestyle=":")
    return at is not None
