"""Writes Figure 6, wherever its numbers are from: the figure, its tables and record, and the best pair of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from doublehead.analysis.balance_figure import Weights, draw_grid
from doublehead.analysis.output import save_figure
from doublehead.analysis.record import Rows, write_tables
from doublehead.config import ModelConfig, ReadOutName
from doublehead.engine.logs import say
from doublehead.models.readout import EXT_SOURCES, resolve_sources

FIGURE = "balance-weights"
NUMBERS = ("AP", "AP50", "AP75")
Grid = dict[ReadOutName, dict[Weights, float | None]]
"""Read-out -> weights -> a number in 0 .. 1; None: unknown."""


def trained_readouts(model: ModelConfig) -> list[ReadOutName]:
    """The read-outs of an Ext whose classifiers and regressor its loss weights train."""
    found = []
    for readout in EXT_SOURCES:
        try:
            resolve_sources(model.head.kind, readout, model.detection.fusion, model.loss)
        except ValueError:
            continue
        found.append(readout)
    return found


def write_figure(
    out: Path,
    name: str,
    aps: Grid,
    models: Mapping[Weights, ModelConfig],
    tables: Sequence[Rows],
    content: Mapping[str, Any],
    errors: Grid | None = None,
) -> None:
    """Write everything into `out`, and print the best pair of weights of each read-out.

    Args:
        name: what was trained, for the title.
        models: weights -> the model that was trained with them.
        content: further values for the record.
        errors: standard errors of `aps`, where there are some.
    """
    untrained = {
        readout: {weights for weights, model in models.items() if readout not in trained_readouts(model)}
        for readout in EXT_SOURCES
    }
    files = write_tables(out, FIGURE, tables, content)
    save_figure(out / f"{FIGURE}.png", draw_grid(aps, untrained, name, errors))
    for readout, values in aps.items():
        known = {weights: ap for weights, ap in values.items() if ap is not None}
        if not known:
            say(f"{readout:<5}  no run to measure")
            continue
        best = max(known, key=known.__getitem__)
        say(f"{readout:<5}  best AP {100 * known[best]:.1f} at l_fc {best[0]}, l_conv {best[1]}; {len(known)} runs")
    say(f"{out}: {', '.join([*files, f'{FIGURE}.png'])}")
