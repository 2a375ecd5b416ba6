"""Recipes travel through JSON and build what they say."""

import dataclasses
import json
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

from doublehead.config import Recipe, from_dict, to_dict
from doublehead.interop.loading import Checkpoint
from doublehead.interop.maskrcnn_benchmark.weights import EXTRACTOR, PREDICTOR, STACKS, plan
from doublehead.models import build_detector
from doublehead.recipes import RECIPES
from tests.support.paths import ROOT

CONVENTIONS = ROOT / "docs" / "other-projects.md"


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


def authors_checkpoint() -> Checkpoint:
    """The tensors of the authors' release that tell what a model is, at full size, without their values."""
    bottlenecks = zip((1, 2, 3, 4), (3, 4, 6, 3), strict=True)
    shapes = {f"backbone.body.layer{n}.{m}.conv3.weight": (1,) for n, blocks in bottlenecks for m in range(blocks)}
    shapes |= {"backbone.fpn.fpn_inner1.weight": (256, 256, 1, 1), f"{EXTRACTOR}.fc6.weight": (1024, 256 * 49)}
    shapes[f"{EXTRACTOR}.nonlocal_conv.top.0.weight"] = (1024, 256, 1, 1)
    for stack in ("0", "1"):
        parts = ("theta.weight", "g.weight", "W.bn.weight")
        shapes |= {f"{STACKS}.{stack}.{part}": (512, 1024, 1, 1) for part in parts}
        shapes[f"{STACKS}.{stack}.ffconv.bottleneck.0.weight"] = (256, 1024, 1, 1)
    for end in ("", "_fc"):
        shapes |= {f"{PREDICTOR}.cls_score{end}.weight": (81, 1024), f"{PREDICTOR}.bbox_pred{end}.weight": (324, 1024)}
    return Checkpoint(Path("authors.pth"), {name: torch.empty(shape, device="meta") for name, shape in shapes.items()})


def test_the_release_recipe_is_the_model_of_a_converted_release():
    converted = plan(authors_checkpoint(), None).config
    recipe = RECIPES["double-head-ext-r50-fpn-release"].model
    assert recipe.backbone.weights == "R-50.pkl" and converted.backbone.weights is None
    backbone = dataclasses.replace(recipe.backbone, weights=None)
    assert dataclasses.replace(recipe, backbone=backbone) == converted


def test_the_release_recipe_says_where_its_backbone_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = "https://dl.fbaipublicfiles.com/detectron/ImageNetPretrained/MSRA/R-50.pkl"
    with pytest.raises(FileNotFoundError, match=f"no file R-50.pkl; get it from {where} and give its path"):
        build_detector(RECIPES["double-head-ext-r50-fpn-release"].model, num_classes=4)


FAMILIES = (  # columns of the documentation's table
    ("*-fpn", "*-fpn-voc07"), ("*-fpn-text",), ("*-c4",), ("*-fpn-release",),
    ("shapes-ext", "bccd-small", "tiny-coco-overfit", "own-data", "miniature-*"),
)  # fmt: skip


def cell(recipe: Recipe, field: str) -> str:
    """A field's value as the documentation's table writes it."""
    value = recipe.model
    for name in field.split("."):
        value = getattr(value, name)
    if field in ("image.mean", "image.std"):
        return ", ".join(f"{255 * part:.7g}" for part in value)
    if field == "backbone.weights" and (value is None or value.endswith(".safetensors")):
        return "none, or `shapes-ext`"
    return f"{value:g}" if isinstance(value, float) else str(value)


def test_the_table_of_conventions_is_true():
    text = CONVENTIONS.read_text(encoding="utf-8").split("## The recipes' conventions")[1]
    lines = (line for line in text.splitlines() if line.startswith("| `"))
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in lines]
    assert len(rows) >= 20
    known = {name for patterns in FAMILIES for name in RECIPES if any(fnmatch(name, one) for one in patterns)}
    assert known == set(RECIPES)
    for label, *cells in rows:
        field = label.split("`")[1]
        for said, patterns in zip(cells, FAMILIES, strict=True):
            recipes = [recipe for name, recipe in RECIPES.items() if any(fnmatch(name, one) for one in patterns)]
            if field.startswith("head.non_local"):
                recipes = [recipe for recipe in recipes if recipe.model.head.non_local.enabled]
            for recipe in recipes if said else ():
                assert cell(recipe, field) == said, (recipe.name, field)


def test_descriptions_do_not_overstate():
    """Who is said to follow the release throughout does, and the others say whose images and boxes they have."""
    release = RECIPES["double-head-ext-r50-fpn-release"].model
    for name, recipe in RECIPES.items():
        model = recipe.model
        if "follows the release throughout" in recipe.about:
            assert model == release
        elif "follows" in recipe.about:
            assert "torchvision in images, backbone and boxes" in recipe.about
            assert (model.image.resize, model.rpn.anchors, model.legacy_boxes) == ("torchvision", "rounded", False)
        assert ("follows the release" in recipe.about) == (model.rpn.straddle == 0), name


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.model.backbone.weights is None])
def test_recipes_build(name):
    build_detector(RECIPES[name].model, num_classes=4)
