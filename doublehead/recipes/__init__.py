"""Every named recipe: `doublehead train NAME`.

- `small`: what a CPU trains in minutes, to try the library and to check it;
- `own_data`: what fits a user's data and device;
- `paper`: a recipe for every row of the paper's Tables 1 to 6;
- `miniature`: the same head kinds on generated pictures, a few minutes each on a CPU.
"""

from __future__ import annotations

from doublehead.config import Recipe

from .miniature import miniature_recipes
from .own_data import own_data_recipes
from .paper import paper_recipes
from .small import small_recipes

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe for recipe in (*small_recipes(), *own_data_recipes(), *miniature_recipes(), *paper_recipes())
}
"""Name -> recipe, for the command lines."""

__all__ = ["RECIPES"]
