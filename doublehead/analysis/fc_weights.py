"""Correlation between the cells' weights in the first layer of the fc-heads (Figure 4).

That layer multiplies each cell of the pooled S x S map by its own C x dim matrix.  The correlation of two cells is
Pearson's over the C * dim weights.  A conv-head has no weights per cell: it applies the same weights everywhere.
"""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from doublehead.analysis.cell_maps import (
    PAIR,
    by_distance,
    checkpoint_specs,
    draw_cell_maps,
    mean_of_pairs,
    pair_limits,
    pair_rows,
)
from doublehead.analysis.options import FCWeights
from doublehead.analysis.output import output_folder, save_figure, write_csv
from doublehead.engine.checkpoint import load_model
from doublehead.engine.distributed import World
from doublehead.engine.logs import say
from doublehead.errors import UserError
from doublehead.models import DoubleHeadRCNN
from doublehead.models.towers import FCTower

COLUMNS = 3  # panels side by side


def run(options: FCWeights, world: World) -> None:
    """Write `fc-weights.csv`, `fc-weights-distance.csv` and `fc-weights.png`, on the main process alone.

    Raises:
        UserError: no checkpoint is named, or one has no fc-head; the folder holds the results of an earlier call.
        CheckpointError: a checkpoint cannot be read.
    """

    def work() -> None:
        before = Path(options.out, "fc-weights.csv")
        if before.exists() and not options.overwrite:  # nothing tells of which heads it is
            raise UserError(
                f"--out {options.out}: holds {before.name}: give another folder, or --overwrite to replace it"
            )
        found: dict[str, np.ndarray] = {}
        for spec in checkpoint_specs(options.checkpoints):
            model, recipe, _, _ = load_model(spec.checkpoint)
            heads = fc_heads(model)
            if not heads:
                raise UserError(f"{spec.checkpoint}: its head is {recipe.model.head.kind!r}, which has no fc-head")
            found |= {f"{spec.name}, {head}": weight_correlation(weight) for head, weight in heads.items()}
        write_results(found, output_folder(options.out, World()))

    world.on_main(work)


def fc_heads(model: DoubleHeadRCNN) -> dict[str, Tensor]:
    """Branch name -> first weight of its fc-tower, `Tensor[dim, C, S, S]`."""
    size = model.config.roi.output_size
    return {
        name: head.tower[1].weight.detach().unflatten(1, (-1, size, size))
        for name, head in model.detector.heads.items()
        if isinstance(head.tower, FCTower)
    }


def weight_correlation(weight: Tensor) -> np.ndarray:
    """Pearson's correlation between the weights of every two cells.

    Args:
        weight: `Tensor[dim, C, S, S]`.

    Returns:
        float64 [S*S, S*S], cells row by row; NaN for a cell whose weights are all equal.
    """
    cells = weight.double().flatten(2).permute(2, 1, 0).flatten(1)  # [S*S, C * dim]
    centred = cells - cells.mean(1, keepdim=True)
    constant = (cells == cells[:, :1]).all(1)
    length = centred.norm(dim=1, keepdim=True).masked_fill(constant[:, None], torch.nan)
    unit = centred / length
    return (unit @ unit.T).clamp(-1, 1).numpy()


def write_results(found: dict[str, np.ndarray], out: Path) -> None:
    """Write the tables and the figure of each head's correlations, and print their means."""
    pairs = [(name, *row) for name, matrix in found.items() for row in pair_rows(matrix)]
    write_csv(out / "fc-weights.csv", ("head", *PAIR, "correlation"), pairs)
    distances = {name: by_distance(matrix) for name, matrix in found.items()}
    rows = [(name, *row) for name, values in distances.items() for row in values]
    write_csv(out / "fc-weights-distance.csv", ("head", "distance", "pairs", "correlation"), rows)
    save_figure(out / "fc-weights.png", draw(found, distances))
    for name, matrix in found.items():
        say(f"{name}: mean correlation of two cells {mean_of_pairs(matrix):.4f}")
        if gaps := int(np.isnan(np.diagonal(matrix)).sum()):
            say(f"{name}: {gaps} cells have only equal weights, and so no correlation: they are gaps")
    say(f"{out}: fc-weights.csv, fc-weights-distance.csv, fc-weights.png")


def draw(found: dict[str, np.ndarray], distances: dict[str, list[tuple[float, int, float]]]) -> Any:
    """The grids of maps with one colour scale, and a last panel with the mean correlation by distance of two cells."""
    from matplotlib.figure import Figure

    count = len(found) + 1
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(5.6 * columns, 5.2 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    limits = pair_limits(list(found.values()))
    for axes, (name, matrix) in zip(panels, found.items(), strict=False):
        shown = draw_cell_maps(axes, matrix, limits, name)
    figure.colorbar(shown, ax=panels[: len(found)], label="Pearson correlation of the weights", shrink=0.7)
    last = panels[len(found)]
    for (name, values), style in zip(distances.items(), cycle(("o-", "s--", "^:", "d-.")), strict=False):
        last.plot([row[0] for row in values], [row[2] for row in values], style, markersize=4, label=name)
    last.set(title="by distance", xlabel="distance of two cells, in cells", ylabel="mean correlation of the weights")
    last.axhline(0, color="0.6", linewidth=0.8)
    last.grid(alpha=0.3)
    last.legend()
    for axes in panels[count:]:
        axes.axis("off")
    figure.suptitle("Correlation of the cells' weights in the fc-head's first layer (dot: the cell itself, always 1)")
    return figure
