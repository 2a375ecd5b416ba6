"""Prints the paper's tables beside the results of finished runs.

A run counts for a row if it has the row's model, data and training; the seed, the device and paths may differ.  A run
with other changes is reported and left out.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from doublehead.analysis.runs import differences, run_folders
from doublehead.config import DataConfig, Recipe, from_dict, to_dict
from doublehead.engine.files import read_recipe
from doublehead.errors import UserError
from doublehead.paper import Row, Table
from doublehead.recipes import RECIPES

QUOTED = "(published)"
QUOTED_NOTE = (
    f"{QUOTED}: numbers that others published for their methods, quoted from the paper; nothing here trains them."
)
_SEED = ("train.seed",)  # a row shows mean and standard deviation over seeds


@dataclass(frozen=True)
class Evaluation:
    """One measurement of one run."""

    recipe: Recipe
    """The run's recipe, with the data and the read-out of the measurement."""
    metrics: dict[str, Any]
    folder: Path


@dataclass
class Found:
    """The evaluations in a folder of runs."""

    evaluations: list[Evaluation] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Messages about what was left out, and why."""


@dataclass(frozen=True)
class Cell:
    """Mean over a row's runs and sample standard deviation (None with one run), in percent."""

    mean: float | None = None
    std: float | None = None

    def __str__(self) -> str:
        if self.mean is None:
            return ""
        return f"{self.mean:.1f}" + (f" ±{self.std:.1f}" if self.std is not None else "")


def collect(root: str | Path) -> Found:
    """Every finished run in `root`, at any depth: its own metrics and those of `evaluate --metrics RUN/metrics-*.json`.

    Raises:
        UserError: `root` is not a folder.
    """
    found = Found()
    for folder in run_folders(root):
        _collect_run(folder, found)
    return found


def _collect_run(folder: Path, found: Found) -> None:
    try:
        recipe = read_recipe(folder)
    except UserError as error:
        found.notes.append(f"{error}: left out")
        return
    files = [path for path in [folder / "metrics.json", *sorted(folder.glob("metrics-*.json"))] if path.is_file()]
    if not files:
        found.notes.append(f"{folder}: not finished, left out")
    for path in files:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            for metrics in measurements(content):
                if precision := metrics.get("precision"):
                    found.notes.append(f"{path}: measured in {precision}, left out: the tables are of fp32")
                    continue
                found.evaluations.append(Evaluation(_as_measured(recipe, metrics), metrics, folder))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            found.notes.append(f"{path}: not the metrics of an evaluation ({error}), left out")
    changes = differences(recipe, RECIPES.get(recipe.name, recipe), _SEED)
    if files and changes:
        found.notes.append(
            f"{folder}: {recipe.name} with {', '.join(map(str, changes))}: counts for no row of that name"
        )


def measurements(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The metrics in a file of `evaluate --metrics`, for one read-out or for each of `--readouts`."""
    if "readouts" not in content:
        return [content]
    return [{"data": content.get("data", {})} | metrics for metrics in content["readouts"].values()]


def _as_measured(recipe: Recipe, metrics: dict[str, Any]) -> Recipe:
    """`recipe` with the data and read-out in the metrics file, where it states them."""
    detection = replace(recipe.model.detection, **metrics.get("detection", {}))
    data = from_dict(to_dict(recipe.data) | metrics.get("data", {}), DataConfig)
    return replace(recipe, model=replace(recipe.model, detection=detection), data=data)


def wanted_recipe(row: Row, table: Table, miniature: bool = False) -> Recipe:
    """The recipe that a run of this row must have; `miniature`: the row's recipe in miniature."""
    recipe = RECIPES[row.miniature if miniature else row.recipe]
    if row.fusion is not None:
        detection = replace(recipe.model.detection, fusion=row.fusion)
        recipe = replace(recipe, model=replace(recipe.model, detection=detection))
    if table.split is not None and not miniature:
        recipe = replace(recipe, data=replace(recipe.data, val_split=table.split))
    return recipe


def row_evaluations(row: Row, table: Table, found: Found, miniature: bool = False) -> list[Evaluation]:
    """The evaluations that count for a row, one for each run."""
    wanted = wanted_recipe(row, table, miniature)
    matching = [item for item in found.evaluations if not differences(item.recipe, wanted, _SEED)]
    return list({item.folder: item for item in matching}.values())


def cell(evaluations: Sequence[Evaluation], column: str) -> Cell:
    """Mean and standard deviation of one metric; evaluations without it are ignored."""
    values = [100 * item.metrics[column] for item in evaluations if item.metrics.get(column) is not None]
    if not values:
        return Cell()
    mean = sum(values) / len(values)
    if len(values) == 1:
        return Cell(mean)
    return Cell(mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)))


@dataclass(frozen=True)
class Line:
    """One line of a comparison."""

    label: str
    recipe: str | None
    """The recipe's name; None: another method, whose numbers the paper quotes."""
    runs: int
    parameters: tuple[float | None, float | None]
    """The conv-head's parameters in M = 2^20: the paper's number, and the one counted from the recipe's model."""
    numbers: tuple[tuple[float | None, Cell], ...]
    """The paper's number and ours, for each column."""


def compare(table: Table, found: Found, miniature: bool = False) -> list[Line]:
    """One line per row, and one for each other method that the paper compares with.

    `miniature`: only the rows that have a miniature recipe.
    """
    lines = [
        Line(f"{other.label}, {other.backbone}", None, 0, (None, None), tuple((n, Cell()) for n in other.published))
        for other in table.others
    ]
    for row, parameters in zip(table.rows, table.parameters or [None] * len(table.rows), strict=True):
        if miniature and row.miniature is None:
            continue
        evaluations = row_evaluations(row, table, found, miniature)
        name = row.miniature if miniature else row.recipe
        numbers = tuple(
            (published, cell(evaluations, column))
            for column, published in zip(table.columns, row.published, strict=True)
        )
        counted = _counted(name) if table.parameters else None
        lines.append(Line(row.label, name, len(evaluations), (parameters, counted), numbers))
    return lines


def _counted(recipe: str) -> float | None:
    from doublehead.analysis.parameters import M, conv_head_weights  # imports PyTorch

    count = conv_head_weights(RECIPES[recipe].model)
    return None if count is None else count / M


def as_text(number: int, table: Table, lines: Sequence[Line], markdown: bool = False) -> str:
    """The table as text; a blank means no run, a dash no number in the paper."""
    header = ["", "recipe", "runs", *(["params paper", "counted"] if table.parameters else [])]
    for column in table.columns:
        header += [f"{column} paper", "yours"]
    rows = []
    for line in lines:
        row = [line.label, line.recipe or QUOTED, str(line.runs or "")]
        if table.parameters:
            paper, counted = line.parameters
            row += ["-" if paper is None else f"{paper:.2f} M", "-" if counted is None else f"{counted:.4f} M"]
        for published, ours in line.numbers:
            row += ["-" if published is None else str(published), str(ours)]
        rows.append(row)
    title = f"Table {number}. {table.title}"
    note = " ".join(filter(None, (table.note, QUOTED_NOTE if table.others else "")))
    if markdown:
        body = ["| " + " | ".join(header) + " |", "|" + " --- |" * 2 + " ---: |" * (len(header) - 2)]
        body += ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join([f"**{title}**", "", *body, *(["", note] if note else [])])
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    body = ["  ".join(_aligned(text, width, i) for i, (text, width) in enumerate(zip(row, widths, strict=True)))
            for row in [header, *rows]]  # fmt: skip
    return "\n".join([title, "", *(line.rstrip() for line in body), *(["", note] if note else [])])


def as_csv(number: int, table: Table, lines: Sequence[Line]) -> str:
    """The table as CSV; fields without a run or a number are empty, and other methods have no recipe."""
    columns = ["table", "row", "recipe", "runs"]
    for column in table.columns:
        columns += [f"{column} paper", f"{column} mean", f"{column} std"]
    if table.parameters:
        columns += ["conv-head M paper", "conv-head M counted"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for line in lines:
        row: list[Any] = [number, line.label, line.recipe, line.runs]
        for published, ours in line.numbers:
            row += [published, ours.mean, ours.std]
        row += line.parameters if table.parameters else ()
        writer.writerow("" if value is None else value for value in row)
    return text.getvalue().rstrip("\n")


def _aligned(text: str, width: int, column: int) -> str:
    return text.ljust(width) if column < 2 else text.rjust(width)
