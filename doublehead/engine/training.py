"""A training from a recipe to its results: what the command line and Python both call."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from doublehead.config import Recipe, to_dict
from doublehead.engine.commands import train_command
from doublehead.engine.files import new_run_folder, write_json
from doublehead.engine.schedule import check_length
from doublehead.errors import DataError, UserError
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
    from doublehead.engine.fitting import Wishes
    from doublehead.engine.logs import counted_warnings
    from doublehead.engine.run import train

    check_arguments(recipe, given, out=out, resume=resume, start_from=start_from)
    wishes = Wishes(base or base_of(recipe, given), frozenset(given), start_from, resumed=resume is not None)
    with join_world(recipe.train.device) as world, counted_warnings(shown=world.is_main):
        if resume is not None:
            folder, made = Path(resume), []
        else:
            folder, made = world.on_main(lambda: _new_folder(recipe.name, out))
        try:
            with _advice(recipe, given, resume):
                metrics = train(recipe, folder, world, resume is not None, wishes)
        except BaseException:
            for path in made:  # a run that never began leaves no empty folders
                with contextlib.suppress(OSError):
                    path.rmdir()
            raise
    return TrainResult(folder, metrics)


def _new_folder(name: str, out: str | Path | None) -> tuple[Path, list[Path]]:
    """The folder of a new run, and the folders that were made for it, the innermost first."""
    before = {path for path in _with_parents(Path(out or "runs")) if path.exists()}
    folder = new_run_folder(name, out)
    return folder, [path for path in _with_parents(folder) if path not in before]


def _with_parents(path: Path) -> list[Path]:
    return [path, *path.parents]


@contextlib.contextmanager
def _advice(recipe: Recipe, given: Collection[str], resume: str | Path | None) -> Iterator[None]:
    """Inside, an error of data that a resumed run has not known also says how to begin another."""
    try:
        yield
    except DataError as error:
        if resume is None or "data.root" not in given:
            raise
        another = train_command(recipe.data.root, resume)
        raise DataError(f"{error}; to train on other data than the run's: {another}", error.reason) from error


def write_recipe(
    path: str | Path,
    recipe: Recipe,
    given: Collection[str] = frozenset(),
    *,
    base: Recipe | None = None,
    start_from: str | Path | None = None,
) -> Recipe:
    """Write the recipe that `start` would train, fitted to the data, to a new file; nothing is trained.

    Args:
        path: the file; the others are those of `start`.

    Returns:
        The recipe.

    Raises:
        UserError: the file exists or cannot be written, or what `start` raises.
    """
    from doublehead.engine.distributed import join_world
    from doublehead.engine.fitting import Wishes, prepare

    path = Path(path)
    check_arguments(recipe, given, start_from=start_from)
    if path.exists() or path.is_symlink():
        raise UserError(f"--write-recipe {path}: is there already, and is not overwritten: give another name")
    with join_world(recipe.train.device) as world:
        fitted = prepare(recipe, world, Wishes(base or base_of(recipe, given), frozenset(given), start_from)).recipe
        try:
            world.on_main(lambda: write_json(path, to_dict(fitted)))
        except OSError as error:
            raise UserError(f"--write-recipe {path}: cannot be written: {error.strerror}") from error
    return fitted


def check_arguments(
    recipe: Recipe,
    given: Collection[str],
    *,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    start_from: str | Path | None = None,
) -> None:
    """Refuse arguments of `start` that exclude each other.

    Raises:
        UserError: names them, and what to do instead.
    """
    if resume is not None and out is not None:
        raise UserError("--out and --resume exclude each other: a resumed run stays in its folder")
    if resume is not None and start_from is not None:
        raise UserError(
            "--from and --resume exclude each other: --resume goes on with a run in its folder, --from begins another "
            "with a detector's weights"
        )
    check_length(recipe.train, given)
    if recipe.data.format == "shapes" and "data.root" in given:
        if "data.format" in given:
            raise UserError(
                f"--data.format shapes draws its own pictures and would not read --data.root {recipe.data.root}: "
                "leave one of the two out"
            )
        run = f"run {resume}" if resume is not None else f"recipe {recipe.name}"
        raise UserError(
            f"--data.root {recipe.data.root}: the {run} draws its own pictures and would not read that folder; "
            f"to train on it: {train_command(recipe.data.root, resume or start_from)}"
        )


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
