"""Recipes travel through JSON and build what they say."""

import json

import pytest

from doublehead.config import Recipe, from_dict, to_dict
from doublehead.models import build_detector
from doublehead.recipes import RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_json(name):
    recipe = RECIPES[name]
    assert recipe.name == name and recipe.about
    assert from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe


def test_unknown_fields_are_named():
    values = to_dict(Recipe())
    values["model"]["head"]["depth"] = 3
    with pytest.raises(ValueError, match="unknown HeadConfig fields: depth"):
        from_dict(values)


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.model.backbone.weights is None])
def test_recipes_build(name):
    build_detector(RECIPES[name].model, num_classes=4)
