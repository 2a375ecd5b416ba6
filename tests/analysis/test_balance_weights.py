"""`doublehead analyze balance-weights`: trains what is missing, invents nothing."""

import csv
import json
import shutil
from dataclasses import replace

import pytest
from PIL import Image

from doublehead.analysis import balance_weights
from doublehead.analysis.balance_weights import cell_recipe, ext_recipe, grid_weights, with_steps
from doublehead.analysis.options import BalanceWeights
from doublehead.cli.analyze import main
from doublehead.config import DataConfig, TrainConfig, to_dict
from doublehead.engine.distributed import World
from doublehead.engine.errors import UserError
from doublehead.engine.files import write_json
from doublehead.models.readout import resolve_sources
from doublehead.recipes import RECIPES
from tests.support.engine_standin import one_thread  # noqa: F401 (a fixture)

WORLD = World()


@pytest.fixture
def tiny(monkeypatch):
    """A recipe that trains for seconds."""
    base = RECIPES["shapes-ext"]
    data = DataConfig("shapes", train_images=4, val_images=2, image_size=48, workers=0)
    training = replace(base.train, steps=2, milestones=(1,), warmup_steps=1, batch_size=2, checkpoint_every=0)
    model = replace(base.model, image=replace(base.model.image, min_size=(48,), max_size=48))
    recipe = replace(base, name="tiny", model=model, data=data, train=training)
    monkeypatch.setitem(RECIPES, "tiny", recipe)
    return recipe


@pytest.fixture
def calls(tiny, monkeypatch):
    """No training and no evaluation: what would have been done is noted, and the files are left."""
    done = []

    def train(recipe, folder, world, resume):
        done.append(("train", folder.name, resume))
        finished_run(folder, recipe)

    def evaluate(cell, readouts, world):
        done.extend((readout, cell.folder.name) for readout in readouts)
        metrics = {"AP": cell.l_fc / 2 + cell.l_conv / 4, "AP50": None, "AP75": 0.25, "APs": 0.1}
        return dict.fromkeys(readouts, metrics)

    monkeypatch.setattr(balance_weights, "train", train)
    monkeypatch.setattr(balance_weights, "_evaluate", evaluate)
    return done


def finished_run(folder, recipe):
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "recipe.json", to_dict(recipe))
    write_json(folder / "metrics.json", {"AP": 0.5})
    (folder / "model.safetensors").write_bytes(b"weights")


def options(out, l_fc=(0.7, 1.0), l_conv=(0.8, 1.0), **more):
    return BalanceWeights(str(out), "cpu", recipe="tiny", l_fc=l_fc, l_conv=l_conv, **more)


def table(out):
    with open(out / "balance-weights.csv", newline="") as file:
        return {(float(r["l_fc"]), float(r["l_conv"]), r["readout"]): r for r in csv.DictReader(file)}


# ---------------------------------------------------------------------- the whole


def test_a_grid_is_trained_measured_and_drawn(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    command = f"balance-weights --recipe tiny --out {out} --device cpu --l-fc 0.7 --l-conv 0.8 1.0 --steps 2 --seed 3"
    main(command.split())
    rows = table(out)
    assert len(rows) == 8
    empty = {key for key, row in rows.items() if row["AP"] == ""}
    assert empty == {(0.7, 1.0, "conv"), (0.7, 1.0, "fused")}
    assert all(0 <= float(row[name]) <= 1 for key, row in rows.items() if key not in empty for name in ("AP", "AP50"))
    recipe = json.loads((out / "runs" / "l_fc-0.7-l_conv-1.0" / "recipe.json").read_text())
    assert recipe["model"]["loss"]["l_conv"] == 1.0 and recipe["model"]["detection"]["readout"] == "split"
    assert recipe["train"]["seed"] == 3
    # The read-out of training is measured twice, after it and from the file.
    metrics = json.loads((out / "runs" / "l_fc-0.7-l_conv-0.8" / "metrics.json").read_text())
    assert float(rows[0.7, 0.8, "fused"]["AP"]) == metrics["AP"]
    assert Image.open(out / "balance-weights.png").size[0] > 500
    assert "fused  best AP" in capsys.readouterr().out


def test_a_second_call_does_only_what_is_missing(calls, tmp_path):
    balance_weights.run(options(tmp_path), WORLD)
    assert [call for call in calls if call[0] == "train"] == [
        ("train", f"l_fc-{l_fc}-l_conv-{l_conv}", True) for l_fc in (0.7, 1.0) for l_conv in (0.8, 1.0)
    ]
    assert len(calls) == 4 + (4 + 2 + 3 + 1)  # trainings, and the read-outs that each of them has
    before = (tmp_path / "balance-weights.csv").read_text()
    calls.clear()
    balance_weights.run(options(tmp_path), WORLD)
    assert calls == [] and (tmp_path / "balance-weights.csv").read_text() == before

    path = tmp_path / "runs" / "l_fc-0.7-l_conv-0.8" / "readouts.json"
    results = json.loads(path.read_text())
    path.write_text(json.dumps({name: results[name] for name in ("fc", "fused")}))
    shutil.rmtree(tmp_path / "runs" / "l_fc-1.0-l_conv-1.0")
    (tmp_path / "runs" / "l_fc-1.0-l_conv-0.8" / "metrics.json").unlink()  # stopped before its end
    balance_weights.run(options(tmp_path), WORLD)
    assert calls == [
        ("split", "l_fc-0.7-l_conv-0.8"), ("conv", "l_fc-0.7-l_conv-0.8"), ("train", "l_fc-1.0-l_conv-0.8", True),
        ("train", "l_fc-1.0-l_conv-1.0", True), ("split", "l_fc-1.0-l_conv-1.0"),
    ]  # fmt: skip


def test_numbers_that_are_not_known_are_gaps(calls, tmp_path):
    balance_weights.run(options(tmp_path), WORLD)
    rows = table(tmp_path)
    gaps = {key for key, row in rows.items() if not row["AP"]}
    assert gaps == {
        (0.7, 1.0, "conv"), (0.7, 1.0, "fused"), (1.0, 1.0, "conv"), (1.0, 1.0, "fused"),
        (1.0, 0.8, "fc"), (1.0, 1.0, "fc"),
    }  # fmt: skip
    assert all(row["AP50"] == "" for row in rows.values())
    assert float(rows[0.7, 0.8, "split"]["AP"]) == pytest.approx(0.35 + 0.2)


def test_collect_trains_nothing(calls, tiny, tmp_path, capsys):
    recipe = cell_recipe(ext_recipe(options(tmp_path)), 0.7, 0.8, options(tmp_path))
    finished_run(tmp_path / "runs" / "l_fc-0.7-l_conv-0.8", recipe)
    balance_weights.run(options(tmp_path, collect=True), WORLD)
    assert [call[0] for call in calls] == ["fused", "split", "fc", "conv"]
    rows = table(tmp_path)
    assert {key[:2] for key, row in rows.items() if row["run"]} == {(0.7, 0.8)}
    assert "3 stay gaps: l_fc-0.7-l_conv-1.0" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["l_fc-0.7-l_conv-0.8"]


def test_collect_with_nothing_there_draws_gaps(calls, tmp_path, capsys):
    balance_weights.run(options(tmp_path, collect=True), WORLD)
    assert calls == [] and not any(row["AP"] for row in table(tmp_path).values())
    assert "no run to measure" in capsys.readouterr().out


def test_finished_runs_of_another_folder_are_taken(calls, tiny, tmp_path):
    recipe = cell_recipe(ext_recipe(options("")), 0.7, 0.8, options(""))
    other = replace(
        recipe, name="mine", data=replace(recipe.data, workers=3), train=replace(recipe.train, device="auto")
    )
    finished_run(tmp_path / "old" / "group" / "mine", other)
    finished_run(tmp_path / "old" / "seed1", replace(recipe, train=replace(recipe.train, seed=1)))
    finished_run(tmp_path / "old" / "half", cell_recipe(recipe, 0.7, 1.0, options("")))
    (tmp_path / "old" / "half" / "metrics.json").unlink()
    balance_weights.run(options(tmp_path / "out", l_fc=(0.7,), runs=str(tmp_path / "old")), WORLD)
    assert [call[1] for call in calls if call[0] == "train"] == ["l_fc-0.7-l_conv-1.0"]
    assert table(tmp_path / "out")[0.7, 0.8, "fc"]["run"] == str(tmp_path / "old" / "group" / "mine")
    assert not (tmp_path / "out" / "runs" / "l_fc-0.7-l_conv-0.8").exists()


# ---------------------------------------------------------------------- its parts


@pytest.mark.parametrize(
    "l_fc, l_conv, readout",
    [
        (0.7, 0.8, "fused"),
        (0.7, 1.0, "split"),
        (1.0, 1.0, "split"),
        (0.5, 0.0, "fc"),
        (0.0, 0.5, "conv"),
        (1.0, 0.5, "fused"),
    ],
)
def test_every_training_gets_a_readout_that_it_trains(tiny, l_fc, l_conv, readout):
    model = cell_recipe(tiny, l_fc, l_conv, options("")).model
    assert (model.loss.l_fc, model.loss.l_conv, model.detection.readout) == (l_fc, l_conv, readout)
    resolve_sources(model.head.kind, model.detection.readout, model.detection.fusion, model.loss)


def test_steps_keep_the_proportions():
    config = TrainConfig(steps=1000, milestones=(600, 900), warmup_steps=50)
    assert with_steps(config, None) is config
    changed = with_steps(config, 200)
    assert (changed.steps, changed.milestones, changed.warmup_steps) == (200, (120, 180), 10)


def test_the_grid_is_sorted_and_has_each_pair_once():
    assert grid_weights(options("", l_fc=(1.0, 0.5, 1.0), l_conv=(0.5,))) == [(0.5, 0.5), (1.0, 0.5)]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"l_fc": (0.5, 1.1)}, "--l-fc: 1.1 is not a balance weight"),
        ({"l_conv": (-0.1,)}, "--l-conv: -0.1 is not a balance weight"),
        ({"l_conv": (float("nan"),)}, "nan is not a balance weight"),
        ({"l_fc": ()}, "--l-fc: the grid is empty"),
        ({"l_fc": (0.0,), "l_conv": (1.0,)}, "no head learns what classifies"),
        ({"l_fc": (1.0,), "l_conv": (0.0,)}, "no head learns what regresses boxes"),
        ({"recipe": "nothing"}, "there is no recipe 'nothing'"),
        ({"recipe": "miniature-fc"}, "its head is 'fc'"),
        ({"recipe": "double-head-ext-none-r50-fpn"}, "detection.fusion is 'none'"),
        ({"runs": "/nowhere"}, "--runs /nowhere: no such folder"),
        ({"steps": 0}, "--steps is 0"),
        ({"seed": -1}, "--seed is -1"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(calls, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        balance_weights.run(replace(options(tmp_path / "out"), **change), WORLD)
    assert calls == [] and not list((tmp_path / "out").glob("*"))


def test_a_run_of_another_recipe_is_not_continued(calls, tiny, tmp_path):
    balance_weights.run(options(tmp_path), WORLD)
    with pytest.raises(UserError, match=r"l_fc-0.7-l_conv-0.8: holds a run with train.steps 2 instead of 4"):
        balance_weights.run(options(tmp_path, steps=4), WORLD)


def test_a_damaged_cache_is_named(calls, tmp_path):
    balance_weights.run(options(tmp_path), WORLD)
    (tmp_path / "runs" / "l_fc-0.7-l_conv-0.8" / "readouts.json").write_text('{"fc": 3}')
    with pytest.raises(UserError, match=r"readouts.json: cannot be read .* delete it"):
        balance_weights.run(options(tmp_path), WORLD)


def test_a_start_that_is_not_there_is_one_line(tiny, tmp_path, monkeypatch, capsys):
    backbone = replace(tiny.model.backbone, weights="nowhere/model.safetensors")
    monkeypatch.setitem(RECIPES, "tiny", replace(tiny, model=replace(tiny.model, backbone=backbone)))
    with pytest.raises(SystemExit) as stop:
        main(f"balance-weights --recipe tiny --out {tmp_path} --device cpu --l-fc 0.7 --l-conv 0.8".split())
    assert stop.value.code == 2 and list((tmp_path / "runs").iterdir()) == []
    assert "error: backbone.weights: no file nowhere/model.safetensors" in capsys.readouterr().err
