"""Which runs there are, and in what two recipes differ."""

from dataclasses import replace

import pytest

from doublehead.analysis.runs import differences, run_folders
from doublehead.config import to_dict
from doublehead.engine.errors import UserError
from doublehead.engine.files import read_recipe, write_json
from doublehead.recipes import RECIPES

RECIPE = RECIPES["shapes-ext"]


def test_differences_name_what_matters(tmp_path):
    elsewhere = replace(RECIPE.data, root="/elsewhere", workers=7)
    same = replace(RECIPE, name="x", about="y", data=elsewhere, train=replace(RECIPE.train, log_every=9))
    assert differences(same, RECIPE) == []
    write_json(tmp_path / "recipe.json", to_dict(RECIPE))
    assert differences(read_recipe(tmp_path), RECIPE) == []  # through JSON
    changed = replace(RECIPE, train=replace(RECIPE.train, steps=9, seed=3))
    assert [str(one) for one in differences(changed, RECIPE)] == [
        "train.steps 9 instead of 480", "train.seed 3 instead of 0",
    ]  # fmt: skip
    assert [one.field for one in differences(changed, RECIPE, ("train.seed",))] == ["train.steps"]
    fused = replace(RECIPE.model, detection=replace(RECIPE.model.detection, fusion="max"))
    assert len(differences(replace(RECIPE, model=fused), RECIPE)) == 1
    assert differences(replace(RECIPE, model=fused), RECIPE, ("model.detection.",)) == []


def test_runs_are_found_at_any_depth(tmp_path):
    for name in ("b", "a/deep"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "recipe.json").write_text("{}")
    assert run_folders(tmp_path) == [tmp_path / "a/deep", tmp_path / "b"]
    with pytest.raises(UserError, match="--runs .*nowhere: no such folder"):
        run_folders(tmp_path / "nowhere")
