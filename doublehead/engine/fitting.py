"""Before a training begins: the data are opened, and what the user left open in the recipe is fitted to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from doublehead.config import Recipe, check
from doublehead.data import DetectionDataset, Splits, open_splits
from doublehead.engine.distributed import World
from doublehead.engine.schedule import planned
from doublehead.engine.starting import Source, read_source, without_start
from doublehead.engine.trainer import check_config
from doublehead.errors import config_errors
from doublehead.recipes import RECIPES
from doublehead.recipes.own_data import NAME as OWN_DATA
from doublehead.recipes.own_data import Facts, adapt, describe


@dataclass(frozen=True)
class Wishes:
    """What a run may change in its recipe, and what it starts from."""

    base: Recipe
    """The recipe before the user's changes: the schedule was made for its steps."""
    given: frozenset[str] = frozenset()
    """The fields that the user has set, by their full names; they stay."""
    start_from: str | Path | None = None
    """A trained detector whose model and weights are taken."""
    resumed: bool = False
    """An earlier run goes on: `base` is its recipe, and only its number of steps follows from `given`."""

    @property
    def adapts(self) -> bool:
        """Whether the recipe fits itself to the data: `own-data`, but not one of this name from a file."""
        return self.base == RECIPES[OWN_DATA]


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


def prepare(
    recipe: Recipe, world: World, wishes: Wishes | None = None, classes: Sequence[str] | None = None
) -> Prepared:
    """Open the data and fit the recipe to them; nothing is written.

    Args:
        wishes: None: the recipe is taken as it is.
        classes: names to use instead of the data's own.

    Raises:
        UserError: the recipe, the data or the detector to start from cannot be used.
    """
    with config_errors():
        check(recipe)  # before the data are read: that may take minutes
        if wishes is None:
            check_config(recipe.train, world)
            splits = open_splits(recipe.data, recipe.train.horizontal_flip, classes)
            return Prepared(recipe, splits.train, splits.val, splits.said, None, [])
        recipe, source, begun = _all_images(recipe, wishes), None, []
        if wishes.start_from is not None:
            source = read_source(wishes.start_from, recipe, wishes.given)
            recipe = source.recipe(recipe)
        elif not wishes.resumed:
            recipe, begun = without_start(recipe)
        if not wishes.adapts:
            check_config(recipe.train, world)
        splits = open_splits(recipe.data, recipe.train.horizontal_flip, classes)
        recipe, notes = _fitted(recipe, wishes, splits, world)
        splits.train.horizontal_flip = recipe.train.horizontal_flip
        check(recipe)
        check_config(recipe.train, world)
    return Prepared(recipe, splits.train, splits.val, splits.said, source, [*begun, *notes])


def _all_images(recipe: Recipe, wishes: Wishes) -> Recipe:
    """Numbers of pictures to draw are no limits to a data set that the user names instead."""
    if wishes.resumed or wishes.base.data.format != "shapes" or recipe.data.format == "shapes":
        return recipe
    limits = {name: None for name in ("train_images", "val_images") if f"data.{name}" not in wishes.given}
    return replace(recipe, data=replace(recipe.data, **limits))


def _fitted(recipe: Recipe, wishes: Wishes, splits: Splits, world: World) -> tuple[Recipe, list[str]]:
    """The recipe with what the user left open fitted to the data, and notes on that."""
    if not wishes.resumed and wishes.adapts:
        device = "cuda" if world.device.type == "cuda" else "cpu"
        facts = Facts.of(splits.train, device, world.size, len(splits.val))
        recipe = adapt(recipe, facts, wishes.given, keep_model=wishes.start_from is not None)
        return recipe, [f"fitted to the data: {describe(recipe, facts)}"]
    train, notes = planned(recipe.train, wishes.base.train, wishes.given, len(splits.train), resumed=wishes.resumed)
    return replace(recipe, train=train), notes
