"""AP over the balance weights (l_fc, l_conv) of Double-Head-Ext, for its four read-outs (Figure 6).

Each cell of the grid is one training, in a folder such as `OUT/runs/l_fc-0.7-l_conv-0.8`.  Each finished run is
evaluated with four read-outs, and `readouts.json` in its folder keeps the results.  So an interrupted grid can be
continued, and several commands with the same --out can train parts of one grid; `--collect` then draws the whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from doublehead.analysis import balance_heads
from doublehead.analysis.balance_results import FIGURE, NUMBERS, Grid, trained_readouts, write_figure
from doublehead.analysis.options import BalanceWeights
from doublehead.analysis.output import output_folder
from doublehead.analysis.record import Rows
from doublehead.analysis.runs import differences, run_folders
from doublehead.config import ReadOutName, Recipe, TrainConfig
from doublehead.data import build_dataset
from doublehead.engine.checkpoint import MODEL_FILE, load_model
from doublehead.engine.distributed import World
from doublehead.engine.evaluator import evaluate_each
from doublehead.engine.files import RECIPE_FILE, read_recipe, write_json
from doublehead.engine.logs import say
from doublehead.engine.run import METRICS_FILE, train
from doublehead.errors import UserError, config_errors
from doublehead.models.readout import EXT_SOURCES
from doublehead.recipes import RECIPES

READOUTS_FILE = "readouts.json"
_READOUT = ("model.detection.",)  # every run is evaluated with all four read-outs


@dataclass(frozen=True)
class Cell:
    """One training of the grid."""

    l_fc: float
    l_conv: float
    recipe: Recipe
    folder: Path
    """The folder of its run, which may not exist yet."""
    finished: bool


def run(options: BalanceWeights, world: World) -> None:
    """Train and evaluate what is missing, or take a record's results, then write the figure, its table and record.

    Raises:
        UserError: not an Ext recipe, an invalid grid, a folder with other contents, data that cannot be used, or a
            record of something else.
    """
    if options.heads is not None:
        results, origin = balance_heads.read_record(options.heads)
        out = output_folder(options.out, world)
        world.on_main(lambda: balance_heads.write_results(results, origin, out))
        return
    started = time.monotonic()
    recipe = ext_recipe(options)
    recipes = [cell_recipe(recipe, *weights, options) for weights in grid_weights(options)]
    out = output_folder(options.out, world)
    cells = world.on_main(lambda: plan(recipes, out, options.runs))
    todo = [cell for cell in cells if cell.finished or not options.collect]
    if world.is_main:
        _say_plan(cells, todo)
    bar = tqdm(todo, desc="grid", unit="run", disable=None if world.is_main else True)
    begun = time.monotonic()
    for number, cell in enumerate(bar):
        if world.is_main and not cell.finished:
            say(f"run {number + 1} of {len(todo)}: l_fc {cell.l_fc}, l_conv {cell.l_conv}{_left(begun, number, todo)}")
        measure(cell, world)
    world.on_main(lambda: write_results(cells, out, recipe.name, time.monotonic() - started))


def ext_recipe(options: BalanceWeights) -> Recipe:
    """The recipe that the grid changes, with the command line's steps, seed and device.

    Raises:
        UserError: there is no such recipe, it is not an Ext that fuses its classifiers, or a number is too small.
    """
    recipe = RECIPES.get(options.recipe)
    if recipe is None:
        raise UserError(f"--recipe: there is no recipe {options.recipe!r}; the recipes are: {', '.join(RECIPES)}")
    kind, fusion = recipe.model.head.kind, recipe.model.detection.fusion
    if kind != "double_head_ext":
        raise UserError(f"--recipe {options.recipe}: its head is {kind!r}; only 'double_head_ext' has balance weights")
    if fusion == "none":
        raise UserError(f"--recipe {options.recipe}: its detection.fusion is 'none', but Figure 6 (d) needs one")
    if options.steps is not None and options.steps < 1:
        raise UserError(f"--steps is {options.steps}, at least 1 is accepted")
    if options.seed is not None and options.seed < 0:
        raise UserError(f"--seed is {options.seed}, at least 0 is accepted")
    training = with_steps(recipe.train, options.steps)
    seed = training.seed if options.seed is None else options.seed
    return replace(recipe, train=replace(training, seed=seed, device=options.device))


def with_steps(config: TrainConfig, steps: int | None) -> TrainConfig:
    """`config` with this many steps (None: unchanged), and milestones and warm-up in proportion."""
    if steps is None:
        return config
    milestones = tuple(round(step * steps / config.steps) for step in config.milestones)
    warmup = round(config.warmup_steps * steps / config.steps)
    return replace(config, steps=steps, milestones=milestones, warmup_steps=warmup)


def grid_weights(options: BalanceWeights) -> list[tuple[float, float]]:
    """Every pair (l_fc, l_conv), in ascending order.

    Raises:
        UserError: an empty axis, or a weight outside 0 .. 1.
    """
    for name, values in (("--l-fc", options.l_fc), ("--l-conv", options.l_conv)):
        if not values:
            raise UserError(f"{name}: the grid is empty, give at least one weight")
        if wrong := [value for value in values if not 0 <= value <= 1]:
            raise UserError(f"{name}: {wrong[0]} is not a balance weight, numbers from 0 to 1 are accepted")
    return [(l_fc, l_conv) for l_fc in sorted(set(options.l_fc)) for l_conv in sorted(set(options.l_conv))]


def cell_recipe(recipe: Recipe, l_fc: float, l_conv: float, options: BalanceWeights) -> Recipe:
    """`recipe` with these weights and a read-out that they train.

    Raises:
        UserError: they train no read-out.
    """
    model = replace(recipe.model, loss=replace(recipe.model.loss, l_fc=l_fc, l_conv=l_conv))
    valid = trained_readouts(model)
    if not valid:
        missing = "classifies" if l_fc == 0 else "regresses boxes"
        raise UserError(f"l_fc {l_fc} with l_conv {l_conv}: no head learns what {missing}; leave the pair out")
    # The recipe's own read-out if possible, otherwise the most complete one that the weights train.
    wanted = (model.detection.readout, "fused", "split", "fc", "conv")
    readout = next(readout for readout in wanted if readout in valid)
    name = f"{recipe.name}, {_cell_name(l_fc, l_conv)}"
    return replace(recipe, name=name, model=replace(model, detection=replace(model.detection, readout=readout)))


def _cell_name(l_fc: float, l_conv: float) -> str:
    return f"l_fc-{l_fc}-l_conv-{l_conv}"


def plan(recipes: list[Recipe], out: Path, runs: str | None) -> list[Cell]:
    """Find each cell's run: finished in `out`, finished in the folder `runs`, or to be trained in `out`.

    Raises:
        UserError: `runs` is not a folder, a run's folder in `out` holds another recipe, or the folder of a finished
            run is not writable (its results are kept there).
    """
    others = list(finished_runs(runs)) if runs is not None else []
    cells = []
    for recipe in recipes:
        loss = recipe.model.loss
        folder = out / "runs" / _cell_name(loss.l_fc, loss.l_conv)
        if (folder / RECIPE_FILE).exists() and (changed := differences(read_recipe(folder), recipe, _READOUT)):
            raise UserError(f"{folder}: holds a run with {changed[0]}; give another --out, or the options it had")
        finished = _is_finished(folder)
        if not finished:
            same = [path for path, other in others if not differences(other, recipe, _READOUT)]
            folder, finished = (same[0], True) if same else (folder, False)
        if finished and not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"{folder}: is not writable, but {READOUTS_FILE} has to be written there")
        cells.append(Cell(loss.l_fc, loss.l_conv, recipe, folder, finished))
    return cells


def finished_runs(folder: str) -> Iterator[tuple[Path, Recipe]]:
    """Finished runs at any depth, sorted by path; runs whose recipe cannot be read are left out.

    Raises:
        UserError: no such folder.
    """
    for path in filter(_is_finished, run_folders(folder)):
        try:
            yield path, read_recipe(path)
        except UserError as error:
            say(f"left out: {error}")


def _is_finished(folder: Path) -> bool:
    return (folder / METRICS_FILE).is_file() and (folder / MODEL_FILE).is_file()


def _say_plan(cells: list[Cell], todo: list[Cell]) -> None:
    finished = sum(cell.finished for cell in cells)
    say(f"{len(cells)} pairs of weights: {finished} are trained, {len(todo) - finished} are to be trained")
    if absent := len(cells) - len(todo):
        names = [_cell_name(cell.l_fc, cell.l_conv) for cell in cells if not cell.finished]
        say(f"--collect: {absent} stay gaps: {', '.join(names[:6])}{', ...' if absent > 6 else ''}")


def _left(begun: float, done: int, todo: list[Cell]) -> str:
    trained, left = (sum(not cell.finished for cell in part) for part in (todo[:done], todo[done:]))
    return f", about {left * (time.monotonic() - begun) / trained / 60:.0f} minutes left" if trained else ""


def measure(cell: Cell, world: World) -> None:
    """Train the cell's run unless it is finished, and evaluate the read-outs without results."""
    if not cell.finished:
        _train(cell, world)
    valid = trained_readouts(cell.recipe.model)
    known = world.on_main(lambda: read_results(cell.folder))
    if missing := [readout for readout in valid if readout not in known]:
        for readout, metrics in _evaluate(cell, missing, world).items():
            known[readout] = {name: metrics.get(name) for name in NUMBERS}
        world.on_main(lambda: write_json(cell.folder / READOUTS_FILE, known))


def _train(cell: Cell, world: World) -> None:
    world.on_main(lambda: cell.folder.mkdir(parents=True, exist_ok=True))
    try:
        train(cell.recipe, cell.folder, world, resume=True)
    except BaseException:
        with contextlib.suppress(OSError):  # a run that never began leaves no empty folder
            cell.folder.rmdir()
        raise


def _evaluate(cell: Cell, readouts: list[ReadOutName], world: World) -> dict[ReadOutName, dict[str, Any]]:
    """Read-out -> metrics, in one pass over the images."""
    model, recipe, classes, _ = load_model(cell.folder)
    with config_errors():
        dataset = build_dataset(recipe.data, "val", classes=classes)
    chosen = {readout: model.to(world.device).detector.resolve_readout(readout) for readout in readouts}
    return evaluate_each(model, dataset, chosen, world, workers=recipe.data.workers, progress=world.is_main)


def read_results(folder: Path) -> dict[str, dict[str, float | None]]:
    """Read-out -> AP, AP50, AP75 in 0 .. 1, for the read-outs evaluated so far.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / READOUTS_FILE
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {readout: {name: values[readout][name] for name in NUMBERS} for readout in values}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it and it is made again") from error


def write_results(cells: list[Cell], out: Path, name: str, seconds: float) -> None:
    """Write figure, table and record of the grid, and print the best cell of each read-out."""
    rows: list[list[Any]] = []
    aps: Grid = {readout: {} for readout in EXT_SOURCES}
    for cell in cells:
        results = read_results(cell.folder)
        for readout in EXT_SOURCES:
            numbers = [results.get(readout, {}).get(name) for name in NUMBERS]
            rows.append([cell.l_fc, cell.l_conv, readout, *numbers, str(cell.folder) if results else None])
            aps[readout][cell.l_fc, cell.l_conv] = numbers[0]
    models = {(cell.l_fc, cell.l_conv): cell.recipe.model for cell in cells}
    tables = [Rows(FIGURE, ("l_fc", "l_conv", "readout", *NUMBERS, "run"), rows)]
    write_figure(out, name, aps, models, tables, {"recipe": name, "seconds": round(seconds, 1)})
