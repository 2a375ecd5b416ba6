"""Before a training begins: the data are opened, and what the user left open in the recipe is fitted to them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from doublehead.config import Recipe, check
from doublehead.data import DetectionDataset, open_splits
from doublehead.engine.distributed import World
from doublehead.engine.schedule import describe, scaled
from doublehead.engine.starting import Source, read_source
from doublehead.engine.trainer import check_config
from doublehead.errors import config_errors
from doublehead.recipes import RECIPES
from doublehead.recipes.own_data import NAME as OWN_DATA
from doublehead.recipes.own_data import Facts, adapt


@dataclass(frozen=True)
class Wishes:
    """What a new run may change in its recipe, and what it starts from."""

    base: Recipe
    """The recipe before the user's changes: the schedule was made for its steps."""
    given: frozenset[str] = frozenset()
    """The fields that the user has set, by their full names; they stay."""
    start_from: str | Path | None = None
    """A trained detector whose model and weights are taken."""


class Prepared(NamedTuple):
    """All that a run needs before its model is built."""

    recipe: Recipe
    training: DetectionDataset
    validation: DetectionDataset
    said: str
    """One line about the data."""
    source: Source | None
    """The detector to start from."""
    notes: list[str]
    """What was changed in the recipe."""


def prepare(recipe: Recipe, world: World, wishes: Wishes | None = None) -> Prepared:
    """Open the data and fit the recipe to them; nothing is written.

    Args:
        wishes: None: the recipe is taken as it is, as that of a resumed run.

    Raises:
        UserError: the recipe, the data or the detector to start from cannot be used.
    """
    with config_errors():
        check(recipe)  # before the data are read: that may take minutes
        if wishes is not None:
            recipe = _all_images(recipe, wishes)
        source = None
        if wishes is not None and wishes.start_from is not None:
            source = read_source(wishes.start_from, recipe, wishes.given)
            recipe = source.recipe(recipe)
        if wishes is None or wishes.base != RECIPES[OWN_DATA]:
            check_config(recipe.train, world)
        splits = open_splits(recipe.data, recipe.train.horizontal_flip)
        training, validation = splits.train, splits.val
        notes: list[str] = []
        if wishes is not None:
            recipe, notes = _fitted(recipe, wishes, training, validation, world)
            training.horizontal_flip = recipe.train.horizontal_flip
            check(recipe)
            check_config(recipe.train, world)
    return Prepared(recipe, training, validation, splits.said, source, notes)


def _all_images(recipe: Recipe, wishes: Wishes) -> Recipe:
    """Numbers of pictures to draw are no limits to a data set that the user names instead."""
    if wishes.base.data.format != "shapes" or recipe.data.format == "shapes":
        return recipe
    limits = {name: None for name in ("train_images", "val_images") if f"data.{name}" not in wishes.given}
    return replace(recipe, data=replace(recipe.data, **limits))


def _fitted(
    recipe: Recipe, wishes: Wishes, training: DetectionDataset, validation: DetectionDataset, world: World
) -> tuple[Recipe, list[str]]:
    """The recipe with what the user left open fitted to the data, and notes on that."""
    if wishes.base == RECIPES[OWN_DATA]:  # not one of this name from a file, which is fitted already
        device = "cuda" if world.device.type == "cuda" else "cpu"
        facts = Facts.of(training, device, world.size, len(validation))
        return adapt(recipe, facts, wishes.given, keep_model=wishes.start_from is not None), []
    scaled_recipe = planned(recipe, wishes.base, wishes.given)
    if scaled_recipe == recipe:
        return recipe, []
    train = scaled_recipe.train
    return scaled_recipe, [f"{train.steps} steps: the schedule keeps its shape: {describe(train)}"]


def planned(recipe: Recipe, base: Recipe, given: Collection[str]) -> Recipe:
    """The recipe with its schedule scaled to the steps, if they alone were given."""
    if "train.steps" not in given or "train.milestones" in given:
        return recipe
    return replace(recipe, train=scaled(recipe.train, base.train.steps, "train.warmup_steps" not in given))
