"""Figures 4 and 8: a number for each pair of cells of an S x S grid, drawn as an S x S grid of maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from doublehead.analysis.readers import HeadSpec, parse_spec
from doublehead.errors import UserError

PAIR = ("row", "column", "other_row", "other_column")
"""Columns of a table of pairs; rows and columns are numbered from 1, from the upper left."""


def checkpoint_specs(texts: Sequence[str]) -> list[HeadSpec]:
    """Parse `[NAME=]CHECKPOINT` arguments.

    Raises:
        UserError: there is none, two have the same name, or one asks for a read-out.
    """
    specs = [parse_spec(text) for text in texts]
    if not specs:
        raise UserError("no checkpoint is named: give at least one [NAME=]CHECKPOINT")
    for spec in specs:
        if spec.readout is not None:
            raise UserError(f"{spec.checkpoint}:{spec.readout}: all heads are drawn here, leave :{spec.readout} out")
    names = [spec.name for spec in specs]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two checkpoints have the name {repeated[0]!r}: give names, as in NAME=CHECKPOINT")
    return specs


def side_of(matrix: np.ndarray) -> int:
    """S, for a matrix of S*S x S*S values."""
    return round(len(matrix) ** 0.5)


def pair_rows(matrix: np.ndarray) -> Iterator[tuple[int, int, int, int, float]]:
    """`PAIR` and the value of every pair of cells; `matrix` float [S*S, S*S], cells row by row."""
    side = side_of(matrix)
    for (cell, other), value in np.ndenumerate(matrix):
        yield cell // side + 1, cell % side + 1, other // side + 1, other % side + 1, float(value)


def by_distance(matrix: np.ndarray) -> list[tuple[float, int, float]]:
    """(distance in cells, number of pairs, their mean) for all pairs of different cells; NaN pairs are left out."""
    rows, columns = np.divmod(np.arange(len(matrix)), side_of(matrix))
    squares = (rows[:, None] - rows) ** 2 + (columns[:, None] - columns) ** 2
    found = []
    for square in np.unique(squares[squares > 0]):
        values = matrix[squares == square]
        values = values[~np.isnan(values)]
        found.append((float(square) ** 0.5, len(values), float(values.mean()) if len(values) else float("nan")))
    return found


def mean_of_pairs(matrix: np.ndarray) -> float:
    """Mean over all pairs of different cells that are not NaN; NaN if there is none."""
    values = matrix[~np.eye(len(matrix), dtype=bool)]
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")


def pair_limits(matrices: Sequence[np.ndarray]) -> tuple[float, float]:
    """Lowest and highest value over pairs of different cells; a cell paired with itself always has 1."""
    values = np.concatenate([matrix[~np.eye(len(matrix), dtype=bool)] for matrix in matrices])
    values = values[~np.isnan(values)]
    return (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)


def tiled(matrix: np.ndarray) -> np.ndarray:
    """Float [S*S, S*S] -> [S*(S+1) - 1, S*(S+1) - 1]: the map of cell (r, c) is tile (r, c); NaN lies between tiles."""
    side = side_of(matrix)
    image = np.full((side, side + 1, side, side + 1), np.nan)
    image[:, :side, :, :side] = matrix.reshape(side, side, side, side).transpose(0, 2, 1, 3)
    return image.reshape(side * (side + 1), -1)[:-1, :-1]


def draw_cell_maps(axes: Any, matrix: np.ndarray, limits: tuple[float, float], title: str) -> Any:
    """Draw `tiled(matrix)`; a white dot marks each map's own cell.  Returns the image, for a colour bar."""
    side = side_of(matrix)
    low, high = limits
    shown = axes.imshow(tiled(matrix), cmap="viridis", vmin=low, vmax=max(high, low + 1e-9), interpolation="nearest")
    own = np.arange(side) * (side + 2)
    x, y = np.meshgrid(own, own)
    size = axes.get_window_extent().height / (side * (side + 1))  # of a cell, in the figure's dots
    axes.scatter(x, y, s=(0.25 * size) ** 2, color="white", edgecolor="black", linewidth=0.5)
    middle = np.arange(side) * (side + 1) + (side - 1) / 2
    axes.set_xticks(middle, range(1, side + 1))
    axes.set_yticks(middle, range(1, side + 1))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(title=title, xlabel="column of the map's own cell", ylabel="row of the map's own cell")
    return shown
