"""`doublehead train [RECIPE] [options]`: train a detector, evaluate it, draw what it finds."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from doublehead.config import DataConfig, ModelConfig, Recipe, TrainConfig, check, field_names
from doublehead.engine.commands import train_again_command, train_recipe_command
from doublehead.engine.files import read_recipe, read_recipe_file
from doublehead.engine.training import check_arguments, start, write_recipe
from doublehead.errors import UserError, config_errors, shown_to_user
from doublehead.recipes import RECIPES
from doublehead.recipes.own_data import NAME as OWN_DATA

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
    recipe: str | None = None
    """A recipe's file instead of a named one: a run's recipe.json, or one of --write-recipe."""
    start_from: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """Start from a trained detector: a run's folder, a converted one, or a model.safetensors. Its model is taken, and
    every weight that fits; of classes with the same names the classifiers' too."""
    resume: str | None = None
    """Folder of a stopped run: go on with its recipe, from its last checkpoint. More steps, another learning rate and
    the like may be given; what would make it another run is refused."""
    write_recipe: str | None = None
    """Write the recipe, with the options and fitted to the data, to this new file, and exit."""
    help_all: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show the options of the model too, and exit."""


@dataclass(frozen=True)
class BriefOptions(Options):
    """The same without the model's options, for a `--help` that fits a few screens."""

    model: Annotated[ModelConfig, tyro.conf.Suppress]


class Command(NamedTuple):
    """A command line, understood."""

    recipe: Recipe
    """The recipe with the options' changes."""
    options: Options
    given: frozenset[str]
    """The recipe's fields that the command line names, by their full names."""
    base: Recipe
    """The recipe without the changes."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line.  Exits with 2 on a user's error, 143 or 130 when stopped by SIGTERM or Ctrl-C."""
    with shown_to_user():
        recipe, options, given, base = parse(sys.argv[1:] if arguments is None else arguments)
        if options.write_recipe is not None:
            write_recipe(options.write_recipe, recipe, given, base=base, start_from=options.start_from)
            print(f"written: {options.write_recipe}; train it: "
                  f"{train_recipe_command(options.write_recipe, options.start_from)}")  # fmt: skip
            return
        start(recipe, given, base=base, out=options.out, resume=options.resume, start_from=options.start_from)


def parse(arguments: Sequence[str]) -> Command:
    """What the command line asks for.

    Raises:
        UserError: an unknown recipe, a value that a field does not accept, or options that exclude each other.
        SystemExit: after `--help`, or an option that is unknown or wrong.
    """
    named, arguments = _take_recipe(list(arguments))
    base = _start_recipe(named, arguments)
    arguments = [_SHORT.get(argument, argument) for argument in arguments]
    brief = bool({"-h", "--help"} & set(arguments))
    if "--help-all" in arguments or "--help_all" in arguments:
        arguments = ["--help"]
    options = tyro.cli(
        BriefOptions if brief else Options,
        prog=f"{PROGRAM} [RECIPE]",
        description=_description(base),
        default=Options(base.data, base.train, base.model),
        args=arguments,
    )
    with config_errors():
        check(Recipe(data=options.data, train=options.train, model=options.model))
    recipe, given = replace(base, data=options.data, train=options.train, model=options.model), _given(arguments)
    check_arguments(recipe, given, out=options.out, resume=options.resume, start_from=options.start_from)
    if options.write_recipe and (options.resume or options.out):
        raise UserError("--write-recipe trains nothing: leave --resume and --out out")
    if options.resume and options.model != base.model:
        raise UserError(
            "--resume goes on with the model as it is: leave the --model options out, or begin another run from its "
            f"weights: {train_again_command(Path(options.resume), base, Path(options.resume))}"
        )
    return Command(recipe, options, given, base)


def _given(arguments: Sequence[str]) -> frozenset[str]:
    """The recipe's fields that the options name, in whichever spelling: `--train.steps=5`, `--data.no-outside-root`."""
    fields = set(field_names(Recipe))
    names = set()
    for argument in arguments:
        if argument.startswith("--"):
            name = argument[2:].partition("=")[0].replace("-", "_")
            path, _, last = name.rpartition(".")
            names |= {name, f"{path}.{last.removeprefix('no_')}"} & fields
    return frozenset(names)


def _take_recipe(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The recipe's name, which stands first if at all, and the rest."""
    if not arguments or arguments[0].startswith("-"):
        return None, arguments
    if arguments[0] not in RECIPES:
        raise UserError(f"there is no recipe {arguments[0]!r}; the recipes are: {', '.join(RECIPES)}")
    return arguments[0], arguments[1:]


def _start_recipe(named: str | None, arguments: list[str]) -> Recipe:
    """The recipe that the options change: the resumed run's own, that of a file, or one of the library's."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--resume", "--recipe", "--from"):
        parser.add_argument(option, nargs="?")
    options = vars(parser.parse_known_args(arguments)[0])
    if options["resume"] is not None:
        if named is not None or options["recipe"] is not None:
            raise UserError(f"--resume goes on with the run's own recipe: leave {named or '--recipe'!r} out")
        return read_recipe(options["resume"])
    if options["recipe"] is not None:
        if named is not None:
            raise UserError(f"{named} and --recipe {options['recipe']} exclude each other: give one recipe")
        return read_recipe_file(options["recipe"])
    on_own_data = "data.root" in _given(arguments)
    if named is None and options["from"] is not None and not on_own_data:
        raise UserError(
            f"--from {options['from']}: on which data? Give --data.root DIR, a recipe's name first, or --recipe FILE"
        )
    return RECIPES[named or (OWN_DATA if on_own_data else DEFAULT_RECIPE)]


def _description(recipe: Recipe) -> str:
    width = max(len(name) for name in RECIPES)
    recipes = "\n".join(f"  {name:<{width}}  {known.about}" for name, known in RECIPES.items())
    return (
        "Train a detector, evaluate it, and leave weights, log, curves and pictures in a folder.\n\n"
        f"RECIPE comes first; without it: {OWN_DATA} with --data.root DIR, else {DEFAULT_RECIPE}. The recipes are\n"
        f"{recipes}\n\n"
        f"The defaults below are those of {recipe.name}. --help-all lists the model's options too.\n"
        "On several processes: torchrun --nproc-per-node N -m doublehead train ..."
    )
