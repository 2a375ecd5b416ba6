"""A training from a recipe to its results: what the command line and Python both call."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from doublehead.config import Recipe
from doublehead.engine.files import new_run_folder
from doublehead.engine.schedule import describe, scaled
from doublehead.errors import UserError
from doublehead.recipes import RECIPES


@dataclass(frozen=True)
class TrainResult:
    """What a training leaves."""

    folder: Path
    """The run's folder."""
    metrics: dict[str, Any]
    """Those of the last evaluation (see `doublehead.engine.evaluate`)."""

    @property
    def model(self) -> Path:
        """The weights to use, those of the last step."""
        return self.folder / "model.safetensors"

    @property
    def files(self) -> list[Path]:
        """Every file of the run, sorted by name."""
        return sorted(path for path in self.folder.rglob("*") if path.is_file())


def start(
    recipe: Recipe,
    given: Collection[str] = frozenset(),
    *,
    base: Recipe | None = None,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    start_from: str | Path | None = None,
) -> TrainResult:
    """Train on this process and those beside it, evaluate, and leave everything in the run's folder.

    Args:
        recipe: what to train, with the user's changes in it.
        given: the fields that the user has set, by their full names ("train.steps"): all others may be adapted, to the
            number of steps and to the data.
        base: the recipe before the user's changes; None: the library's recipe of this name if only `given` fields
            differ from it, else `recipe` itself.
        out: folder of the new run; None: runs/NAME-1, -2, ...
        resume: folder of a stopped run to go on with; `recipe` is then its own, with what may change.
        start_from: a trained detector to start from, with its model's configuration and its weights.

    Raises:
        UserError: arguments that exclude each other; a recipe, a folder or data that cannot be used.  Then nothing on
            the disk has changed.
        Stopped, KeyboardInterrupt: after SIGTERM or Ctrl-C.
    """
    from doublehead.engine.distributed import join_world  # only now: these import PyTorch
    from doublehead.engine.logs import counted_warnings, say
    from doublehead.engine.run import train

    if resume is not None and out is not None:
        raise UserError("--out and --resume exclude each other: a resumed run stays in its folder")
    if start_from is not None:
        raise UserError("--from is not built yet")
    asked = recipe
    if resume is None:
        recipe = planned(recipe, base or base_of(recipe, given), given)
    with join_world(recipe.train.device) as world, counted_warnings(shown=world.is_main):
        if world.is_main and asked.train != recipe.train:
            say(f"note: {recipe.train.steps} steps: the schedule keeps its shape: {describe(recipe.train)}")
        folder = Path(resume) if resume is not None else world.on_main(lambda: new_run_folder(recipe.name, out))
        try:
            metrics = train(recipe, folder, world, resume is not None)
        except BaseException:
            with contextlib.suppress(OSError):  # a run that never began leaves no empty folders
                folder.rmdir()
                if out is None:
                    folder.parent.rmdir()
            raise
    return TrainResult(folder, metrics)


def base_of(recipe: Recipe, given: Collection[str]) -> Recipe:
    """The library's recipe of this name, if `recipe` differs from it in `given` fields alone; else `recipe` itself."""
    known = RECIPES.get(recipe.name)
    return known if known is not None and _differing(known, recipe) <= set(given) else recipe


def _differing(one: Any, other: Any, name: str = "") -> set[str]:
    """The full names of the fields in which two configurations differ."""
    if type(one) is not type(other) or not hasattr(one, "__dataclass_fields__"):
        return set() if one == other else {name}
    inner = (
        _differing(getattr(one, field), getattr(other, field), f"{name}.{field}" if name else field)
        for field in one.__dataclass_fields__
    )
    return set().union(*inner)


def planned(recipe: Recipe, base: Recipe, given: Collection[str]) -> Recipe:
    """The recipe with its schedule scaled to the steps, if they alone were given."""
    if "train.steps" not in given or "train.milestones" in given:
        return recipe
    return replace(recipe, train=scaled(recipe.train, base.train.steps, "train.warmup_steps" not in given))
