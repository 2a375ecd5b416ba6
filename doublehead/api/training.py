"""Training from Python: `doublehead.train`."""

from __future__ import annotations

import difflib
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doublehead.config import DataConfig, ModelConfig, Recipe, TrainConfig, field_names, override
from doublehead.engine import training
from doublehead.engine.files import read_recipe, read_recipe_file
from doublehead.errors import UserError, config_errors
from doublehead.recipes import RECIPES

if TYPE_CHECKING:
    from .predictor import Predictor

DEFAULT_RECIPE = "own-data"
Changes = Mapping[str, Any]


class TrainResult(training.TrainResult):
    """What a training leaves: `folder`, `metrics` (those of the last evaluation, AP in 0..1), and paths."""

    @property
    def best(self) -> Path:
        """The weights of the best AP that was measured on the way; without evaluations on the way, those of `model`."""
        from doublehead.engine.best import BEST_FILE  # only now: it imports PyTorch

        best = self.folder / BEST_FILE
        return best if best.exists() else self.model

    def load(self, device: str = "auto") -> Predictor:
        """The detector of the last step, as `doublehead.load` gives it; `doublehead.load(result.best)` is the best."""
        from .loading import load

        return load(self.folder, device)

    def __repr__(self) -> str:
        shown = [
            f"{name} {100 * self.metrics[name]:.1f}" for name in ("AP", "AP50") if self.metrics.get(name) is not None
        ]
        return f"TrainResult({str(self.folder)!r}{': ' if shown else ''}{', '.join(shown)})"


def train(
    recipe: str | os.PathLike | Recipe | None = None,
    data: str | os.PathLike | Changes | DataConfig | None = None,
    *,
    model: Changes | ModelConfig | None = None,
    train: Changes | TrainConfig | None = None,
    out: str | os.PathLike | None = None,
    resume: str | os.PathLike | None = None,
    start_from: str | os.PathLike | None = None,
    **misplaced: Any,
) -> TrainResult:
    """Train a detector, evaluate it, and leave everything in a folder, as the command `doublehead train` does.

    In the main thread, a first Ctrl-C (or a notebook's stop button) finishes the step, saves the state and raises
    `KeyboardInterrupt`; `resume` then goes on.  In another thread a training cannot be stopped in this way.

    Loader processes (`data={"workers": 2}`) start as Python starts processes here: by fork on Linux up to Python 3.13.
    On other systems, and from Python 3.14 on, a script must call this under `if __name__ == "__main__":`, which does no
    harm anywhere.

    Args:
        recipe: a recipe's name (`doublehead.recipes.RECIPES`), a recipe's file (`.json`), or a `Recipe`.  None:
            "own-data", which fits itself to the data; with `resume`, the run's own.
        data: the data set's folder; or changes of `recipe.data`: a dictionary of fields, as `{"root": "cells",
            "classes": ["RBC", "WBC"]}`, or a `DataConfig`.
        model: changes of `recipe.model`, as `{"image": {"min_size": [640]}}`.
        train: changes of `recipe.train`, as `{"epochs": 20, "device": "cuda"}`.
        out: folder of the run; None: runs/RECIPE-1, -2, ...
        resume: folder of a stopped run to go on with.
        start_from: a trained detector to start from: a run's folder, a `model.safetensors`, a converted folder.

    Returns:
        `folder`; `metrics`, those of the last evaluation; the paths `model` (the last weights), `best` and `files`; and
            `load()`, the trained detector.

    Raises:
        UserError: a field does not exist or does not accept its value, the message gives its full name; arguments
            exclude each other; or the recipe, the data or a folder cannot be used.  Then nothing on the disk has
            changed.
        KeyboardInterrupt: stopped by Ctrl-C; the state is saved.

    Example:
        >>> result = doublehead.train(data="data/cells", train={"steps": 200}, out="runs/cells")
        >>> result.metrics["AP50"], result.load().predict("photo.jpg")
    """
    if misplaced:
        raise TypeError(_where_it_belongs(misplaced))
    out, resume, start_from = (None if path is None else Path(path).expanduser() for path in (out, resume, start_from))
    base = _base(recipe, resume)
    changes = {"data": {"root": data} if isinstance(data, (str, os.PathLike)) else data, "model": model, "train": train}
    with config_errors():
        changed, given = override(base, {name: value for name, value in changes.items() if value is not None})
    if changed.data.format != "shapes" and changed.data.root is None:
        raise UserError(
            "data is missing: the folder of the data set, doublehead.train(data='data/cells'); the recipe 'shapes-ext' "
            "draws its own pictures"
        )
    try:
        result = training.start(changed, given, base=base, out=out, resume=resume, start_from=start_from)
    except SystemExit as stop:
        if stop.code != 128 + signal.SIGINT:
            raise
        raise KeyboardInterrupt("the training was stopped by Ctrl-C") from stop  # a library does not end its caller
    return TrainResult(**vars(result))


def _base(recipe: str | os.PathLike | Recipe | None, resume: str | os.PathLike | None) -> Recipe:
    """The recipe before the user's changes.

    Raises:
        UserError: there is no such recipe, or one beside `resume`.
    """
    if resume is not None:
        if recipe is not None:
            raise UserError(f"resume goes on with the run's own recipe: leave {_name_of(recipe)!r} out")
        return read_recipe(resume)
    recipe = DEFAULT_RECIPE if recipe is None else recipe
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, (str, os.PathLike)):
        raise TypeError(f"recipe is a {type(recipe).__name__}: expected a recipe's name, its file (.json), or a Recipe")
    name = os.fspath(recipe)
    if name in RECIPES:
        return RECIPES[name]
    if Path(name).suffix.lower() == ".json":
        return read_recipe_file(name)
    hint = f"the recipes are: {', '.join(RECIPES)}"
    if Path(name).is_dir():
        hint = f"a folder of data is another argument: doublehead.train(data={name!r})"
    elif similar := difflib.get_close_matches(name, RECIPES, n=1):
        hint = f"did you mean {similar[0]!r}? {hint[0].upper()}{hint[1:]}"
    raise UserError(f"there is no recipe {name!r}; {hint}")


def _name_of(recipe: Any) -> str:
    return recipe.name if isinstance(recipe, Recipe) else str(recipe)


def _where_it_belongs(misplaced: dict[str, Any]) -> str:
    """Which dictionary takes a field that was given as an argument of its own."""
    name, value = next(iter(misplaced.items()))
    full = next((n for n in field_names() if n.endswith(f".{name}")), None)
    if full is None:
        return f"train() got an unexpected argument {name!r}"
    *path, field = full.split(".")
    written = f"{{{field!r}: {value!r}}}"
    for outer in reversed(path[1:]):
        written = f"{{{outer!r}: {written}}}"
    return f"{name!r} is a field of the recipe's {path[0]}: give {path[0]}={written}"
