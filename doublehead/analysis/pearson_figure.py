"""Draws Figure 3: bars of Pearson's correlation, with standard errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from doublehead.analysis.jackknife import Estimate
from doublehead.analysis.output import save_figure

HATCHES = ("", "///", "...", "\\\\\\", "xxx", "ooo", "---", "+++")


class Correlation(NamedTuple):
    """One bar of the figure."""

    head: str
    kind: str
    group: str
    pairs: int
    """Of all seeds together."""
    value: Estimate
    """Pearson's correlation; no value: too few pairs, or scores or IoUs do not vary."""
    seeds: int


def draw(path: Path, correlations: Sequence[Correlation], title: str, titles: Mapping[str, str]) -> str:
    """A panel for each kind of boxes, with a cluster of bars for each group and a bar for each head.

    Args:
        titles: kind -> its panel's title.

    Returns:
        The file's name.
    """
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys(one.group for one in correlations))
    heads = list(dict.fromkeys(one.head for one in correlations))
    width = 0.8 / len(heads)
    figure = Figure(figsize=(max(8, 1.2 + 0.25 * len(groups) * (len(heads) + 1)), 8.6), layout="constrained")
    panels = figure.subplots(len(titles), 1, sharex=True, sharey=True)
    for axes, (kind, name) in zip(panels, titles.items(), strict=True):
        for number, head in enumerate(heads):
            values = [one.value for one in correlations if (one.head, one.kind) == (head, kind)]
            positions = [group + (number - (len(heads) - 1) / 2) * width for group in range(len(groups))]
            _draw_bars(axes, positions, values, width, number, head)
        axes.set_xticks(range(len(groups)), [group.replace(" ", "\n") for group in groups])
        axes.set_title(name, fontsize="medium")
        axes.set(xlim=(-0.6, len(groups) - 0.4), ylabel="Pearson's correlation")
        axes.axhline(0, color="black", lw=0.8)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    panels[0].margins(y=0.2)  # for the numbers
    seeds = sorted({one.seeds for one in correlations})
    over = "pictures" if seeds == [1] else f"seeds ({', '.join(map(str, seeds))})"
    figure.suptitle(f"{title}\n± standard error over {over}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save_figure(path, figure)
    return path.name


def _draw_bars(axes: Any, positions: list[float], values: list[Estimate], width: float, number: int, head: str) -> None:
    heights = [math.nan if one.value is None else one.value for one in values]
    errors = [one.shown or 0.0 for one in values]
    hatch = HATCHES[number % len(HATCHES)]
    axes.bar(
        positions, heights, width, label=head, hatch=hatch, color=f"C{number}", alpha=0.75, edgecolor="black", lw=0.6
    )
    axes.errorbar(positions, heights, errors, fmt="none", ecolor="black", elinewidth=1, capsize=2)
    for position, one, error in zip(positions, values, errors, strict=True):
        height, label = (0.0, "gap") if one.value is None else (one.value, f"{one.value:.2f}")
        down = height < 0
        axes.annotate(
            label, (position, height - error if down else height + error), (0, -3 if down else 3),
            textcoords="offset points", ha="center", va="top" if down else "bottom", fontsize="x-small", rotation=90,
        )  # fmt: skip
