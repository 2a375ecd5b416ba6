"""Command lines that messages tell the user to run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from doublehead.config import Recipe
from doublehead.engine.files import RECIPE_FILE
from doublehead.recipes import RECIPES


def train_command(root: str | None, start_from: str | Path | None = None, classes: Sequence[str] | None = None) -> str:
    """The command that trains on the data in `root`, from a trained detector or not, on these classes or all."""
    chosen = f" --data.classes {shlex.join(classes)}" if classes else ""
    return f"doublehead train{_from(start_from)} --data.root {shlex.quote(root) if root else 'DIR'}{chosen}"


def train_recipe_command(path: str | Path, start_from: str | Path | None = None) -> str:
    """The command that trains the recipe in a file, from a trained detector or not."""
    return f"doublehead train --recipe {shlex.quote(str(path))}{_from(start_from)}"


def train_again_command(folder: Path, recipe: Recipe, start_from: Path | None) -> str:
    """The command of another run on the data of the one in `folder`.

    Args:
        recipe: that run's, or a change of it.
        start_from: a trained detector to start from; None: train anew, by that run's own recipe.
    """
    known = RECIPES.get(recipe.name)
    if start_from is None or (known is not None and known.data.format == recipe.data.format == "shapes"):
        return train_recipe_command(folder / RECIPE_FILE, start_from)
    return train_command(recipe.data.root, start_from, recipe.data.classes)


def _from(start_from: str | Path | None) -> str:
    return f" --from {shlex.quote(str(start_from))}" if start_from is not None else ""
