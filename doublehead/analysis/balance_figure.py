"""Draws Figure 6: AP over the balance weights, one heat map for each read-out."""

from __future__ import annotations

from typing import Any

import numpy as np

from doublehead.config import ReadOutName

TITLES: dict[ReadOutName, str] = {
    "conv": "(a) conv-head alone",
    "fc": "(b) fc-head alone",
    "split": "(c) fc classes + conv boxes",
    "fused": "(d) fused classes + conv boxes",
}
"""Read-out -> its panel in Figure 6."""
Weights = tuple[float, float]
"""(l_fc, l_conv)."""


def draw_grid(
    aps: dict[ReadOutName, dict[Weights, float | None]],
    untrained: dict[ReadOutName, set[Weights]],
    name: str,
    errors: dict[ReadOutName, dict[Weights, float | None]] | None = None,
) -> Any:
    """Four heat maps with one grey scale; the best cell of each is framed.

    Args:
        aps: read-out -> weights -> AP in 0 .. 1; None: unknown.
        untrained: read-out -> weights that leave one of its tasks untrained; these cells are hatched.
        name: what was trained, for the title.
        errors: standard errors of `aps`.
    """
    from matplotlib.figure import Figure

    known = [100 * ap for values in aps.values() for ap in values.values() if ap is not None]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    limits = (low - 0.15 * max(high - low, 0.1), high + 1e-9)  # white is reserved for empty cells
    columns, rows = (sorted({weights[axis] for weights in aps["conv"]}) for axis in (0, 1))
    figure = Figure(figsize=(2 * max(4.2, 0.8 * len(columns)), 2 * max(3.6, 0.62 * len(rows))), layout="constrained")
    panels = figure.subplots(2, 2)
    for axes, (readout, title) in zip(panels.flat, TITLES.items(), strict=True):
        own = {} if errors is None else errors[readout]
        shown = _draw_panel(axes, aps[readout], untrained[readout], columns, rows, limits, own)
        axes.set_title(title)
    if known:
        figure.colorbar(shown, ax=panels, label="AP, percent", shrink=0.8)
    gaps = [weights for readout in aps for weights, ap in aps[readout].items() if ap is None]
    figure.suptitle(f"AP over the balance weights: {name}", fontsize="large")
    notes = ["thick frame: best of its panel"]
    if errors is not None and any(error is not None for own in errors.values() for error in own.values()):
        notes.append("±: standard error over seeds")
    if any(untrained.values()):
        notes.append("hatched: the weights leave this read-out untrained")
    if len(gaps) > sum(map(len, untrained.values())):
        notes.append("empty: not trained yet, or nothing to measure")
    figure.supxlabel("; ".join(notes), fontsize="small")
    return figure


def _draw_panel(
    axes: Any,
    aps: dict[Weights, float | None],
    untrained: set[Weights],
    columns: list[float],
    rows: list[float],
    limits: tuple[float, float],
    errors: dict[Weights, float | None],
) -> Any:
    from matplotlib.patches import Rectangle

    values = np.full((len(rows), len(columns)), np.nan)
    for (l_fc, l_conv), ap in aps.items():
        if ap is not None:
            values[rows.index(l_conv), columns.index(l_fc)] = 100 * ap
    # The paper's layout: l_fc grows to the right, l_conv upwards.
    shown = axes.imshow(values, cmap="Greys", vmin=limits[0], vmax=limits[1], origin="lower", aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        if (columns[x], rows[y]) in untrained:
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, hatch="///", edgecolor="0.6", linewidth=0))
        elif not np.isnan(value):
            dark = shown.norm(value) > 0.5
            error = errors.get((columns[x], rows[y]))
            text = f"{value:.1f}" + ("" if error is None else f"\n±{100 * error:.1f}")
            axes.text(x, y, text, ha="center", va="center", color="white" if dark else "black")
    if not np.isnan(values).all():
        y, x = np.unravel_index(np.nanargmax(values), values.shape)
        for colour, width in (("white", 6), ("black", 2.5)):  # visible on light and on dark cells
            axes.add_patch(Rectangle((x - 0.44, y - 0.44), 0.88, 0.88, fill=False, edgecolor=colour, linewidth=width))
    axes.set(xlabel="l_fc: share of classification in the fc-head", ylabel="l_conv: share of boxes in the conv-head")
    axes.set_xticks(range(len(columns)), [f"{value:g}" for value in columns])
    axes.set_yticks(range(len(rows)), [f"{value:g}" for value in rows])
    return shown
