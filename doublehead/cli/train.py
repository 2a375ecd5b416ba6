"""`doublehead train [RECIPE] [options]`: train a detector, evaluate it, draw what it finds."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from doublehead.config import DataConfig, ModelConfig, Recipe, TrainConfig, check
from doublehead.engine.files import new_run_folder, read_recipe
from doublehead.engine.schedule import describe, scaled
from doublehead.errors import UserError, config_errors, shown_to_user
from doublehead.recipes import RECIPES

DEFAULT_RECIPE = "shapes-ext"
PROGRAM = "doublehead train"
_SHORT = {"--on-bad-record": "--data.on-bad-record"}


@dataclass(frozen=True)
class Options:
    """What the command line takes."""

    data: DataConfig
    train: TrainConfig
    model: ModelConfig
    out: str | None = None
    """Folder of the run; without it runs/RECIPE-1, -2, ..."""
    resume: str | None = None
    """Folder of a stopped run: go on with its recipe, from its last checkpoint. More steps, another learning rate and
    the like may be given; what would make it another run is refused."""
    help_all: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show the options of the model too, and exit."""


@dataclass(frozen=True)
class BriefOptions(Options):
    """The same without the model's options, for a `--help` that fits a few screens."""

    model: Annotated[ModelConfig, tyro.conf.Suppress]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line.  Exits with 2 on a user's error, 143 or 130 when stopped by SIGTERM or Ctrl-C."""
    with shown_to_user():
        recipe, options = parse(sys.argv[1:] if arguments is None else arguments)
        run(recipe, options)


def parse(arguments: Sequence[str]) -> tuple[Recipe, Options]:
    """The recipe with the command line's changes, and the other options.

    Raises:
        UserError: an unknown recipe, a value that a field does not accept, or options that exclude each other.
        SystemExit: after `--help`, or an option that is unknown or wrong.
    """
    named, arguments = _take_recipe(list(arguments))
    recipe = _start_recipe(named, arguments)
    arguments = [_SHORT.get(argument, argument) for argument in arguments]
    brief = bool({"-h", "--help"} & set(arguments))
    if "--help-all" in arguments or "--help_all" in arguments:
        arguments = ["--help"]
    options = tyro.cli(
        BriefOptions if brief else Options,
        prog=f"{PROGRAM} [RECIPE]",
        description=_description(recipe),
        default=Options(recipe.data, recipe.train, recipe.model),
        args=arguments,
    )
    with config_errors():
        check(Recipe(data=options.data, train=options.train, model=options.model))
    if options.resume and options.out:
        raise UserError("--out and --resume exclude each other: a resumed run stays in its folder")
    if options.resume and options.model != recipe.model:
        raise UserError("--resume goes on with the model as it is: leave the --model options out")
    train = options.train
    alone = _is_given("--train.steps", arguments) and not _is_given("--train.milestones", arguments)
    if alone and not options.resume:
        # A resumed run keeps its schedule, which its steps so far have followed.
        train = scaled(train, recipe.train.steps, warmup=not _is_given("--train.warmup-steps", arguments))
    return replace(recipe, data=options.data, train=train, model=options.model), options


def run(recipe: Recipe, options: Options) -> None:
    """Train on this process and those beside it."""
    from doublehead.engine.distributed import join_world  # only now: these import PyTorch
    from doublehead.engine.logs import counted_warnings, say
    from doublehead.engine.run import train

    with join_world(recipe.train.device) as world, counted_warnings(shown=world.is_main):
        resume = options.resume is not None
        if world.is_main and options.train != recipe.train:
            say(f"note: {recipe.train.steps} steps: the schedule keeps its shape: {describe(recipe.train)}")
        folder = Path(options.resume) if resume else world.on_main(lambda: new_run_folder(recipe.name, options.out))
        try:
            train(recipe, folder, world, resume)
        except BaseException:
            with contextlib.suppress(OSError):  # a run that never began leaves no empty folders
                folder.rmdir()
                if options.out is None:
                    folder.parent.rmdir()
            raise


def _is_given(option: str, arguments: Sequence[str]) -> bool:
    """Whether the command line names `option`."""
    return any(argument.partition("=")[0].replace("_", "-") == option for argument in arguments)


def _take_recipe(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The recipe's name, which stands first if at all, and the rest."""
    if not arguments or arguments[0].startswith("-"):
        return None, arguments
    if arguments[0] not in RECIPES:
        raise UserError(f"there is no recipe {arguments[0]!r}; the recipes are: {', '.join(RECIPES)}")
    return arguments[0], arguments[1:]


def _start_recipe(named: str | None, arguments: list[str]) -> Recipe:
    """The recipe that the options change: the resumed run's own, or one of the library's."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", nargs="?")
    folder = parser.parse_known_args(arguments)[0].resume
    if folder is None:
        return RECIPES[named or DEFAULT_RECIPE]
    if named is not None:
        raise UserError(f"--resume goes on with the run's own recipe: leave {named!r} out")
    return read_recipe(folder)


def _description(recipe: Recipe) -> str:
    width = max(len(name) for name in RECIPES)
    recipes = "\n".join(f"  {name:<{width}}  {known.about}" for name, known in RECIPES.items())
    return (
        "Train a detector, evaluate it, and leave weights, log, curves and pictures in a folder.\n\n"
        f"RECIPE comes first; without it: {DEFAULT_RECIPE}. The recipes are\n{recipes}\n\n"
        f"The defaults below are those of {recipe.name}. --help-all lists the model's options too.\n"
        "On several processes: torchrun --nproc-per-node N -m doublehead train ..."
    )
