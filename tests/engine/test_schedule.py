"""The learning rate of each step, and what follows from steps or epochs alone."""

import sys
from dataclasses import replace

import pytest

from doublehead.cli.train import main as train_main
from doublehead.config import Recipe, TrainConfig
from doublehead.engine import pictures, run
from doublehead.engine.files import read_recipe
from doublehead.engine.logs import read_log
from doublehead.engine.schedule import describe, learning_rate, notes, notes_of_more_steps, planned
from doublehead.engine.training import check_arguments
from doublehead.errors import UserError
from tests.support.engine_standin import TINY, tiny_models

STEP = TrainConfig(steps=100, batch_size=4, lr=0.5, milestones=(60, 80), warmup_steps=10)
COSINE = replace(STEP, schedule="cosine")


def test_a_cosine_falls_from_the_end_of_the_warm_up_to_nothing():
    assert learning_rate(0, COSINE) == pytest.approx(0.5 / 3)
    assert learning_rate(5, COSINE) == pytest.approx(0.5 * 2 / 3)
    assert learning_rate(10, COSINE) == pytest.approx(0.5)
    assert learning_rate(55, COSINE) == pytest.approx(0.25)
    assert 0 < learning_rate(99, COSINE) < 0.001 and learning_rate(100, COSINE) == pytest.approx(0)
    rates = [learning_rate(step, COSINE) for step in range(10, 100)]
    assert rates == sorted(rates, reverse=True)
    assert learning_rate(3, replace(COSINE, steps=2, warmup_steps=5)) > 0  # no division by nothing


def test_epochs_are_passes_over_the_images():
    given = {"train.epochs"}
    train, said = planned(replace(STEP, epochs=3.0), STEP, given, images=205)
    assert (train.steps, train.milestones, train.warmup_steps) == (154, (92, 123), 15)  # the last batch counts whole
    assert said == [
        "3 epochs of 205 images, 4 at a time, are 154 steps",
        "154 steps: the schedule keeps its shape: milestones 92, 123, warm-up 15",
    ]
    assert planned(replace(STEP, epochs=0.001), STEP, given, 205)[0].steps == 1
    assert planned(replace(STEP, epochs=2.0), STEP, given, 200)[0] == replace(STEP, epochs=2.0)  # 100 steps as before


def test_epochs_of_a_recipe_count_for_new_data_until_steps_are_given():
    recipe = replace(STEP, epochs=2.0)
    assert planned(recipe, recipe, (), images=400)[0].steps == 200
    train, _ = planned(replace(recipe, steps=50), recipe, {"train.steps"}, images=400)
    assert train.steps == 50 and train.epochs is None and train.milestones == (30, 40)


def test_steps_and_epochs_exclude_each_other():
    with pytest.raises(UserError, match="train.steps and train.epochs exclude each other: give one of them"):
        planned(replace(STEP, epochs=2.0), STEP, {"train.steps", "train.epochs"}, images=10)
    assert planned(STEP, STEP, {"train.steps", "train.epochs"}, images=10)[0] == STEP  # epochs None is none
    with pytest.raises(UserError, match="exclude each other"):  # before any data are read
        check_arguments(Recipe(train=replace(STEP, epochs=2.0)), {"train.steps", "train.epochs"})


def test_what_the_user_set_is_not_scaled():
    longer = replace(STEP, steps=200)
    assert planned(longer, STEP, {"train.steps"}, 10)[0].milestones == (120, 160)
    assert planned(longer, STEP, {"train.steps", "train.warmup_steps"}, 10)[0].warmup_steps == 10
    assert planned(longer, STEP, {"train.steps", "train.milestones"}, 10) == (longer, [])
    assert planned(STEP, STEP, (), 10) == (STEP, [])


def test_a_resumed_run_keeps_its_schedule_and_its_steps():
    recipe = replace(STEP, epochs=2.0)
    assert planned(recipe, recipe, (), images=999, resumed=True) == (recipe, [])
    longer, said = planned(replace(recipe, epochs=4.0), recipe, {"train.epochs"}, images=200, resumed=True)
    assert (longer.steps, longer.milestones, longer.warmup_steps) == (200, (60, 80), 10) and len(said) == 1
    longer, _ = planned(replace(recipe, steps=300), recipe, {"train.steps"}, images=200, resumed=True)
    assert (longer.steps, longer.epochs) == (300, None)


def test_descriptions_speak_of_the_cosine():
    assert describe(STEP) == "milestones 60, 80, warm-up 10"
    assert describe(COSINE) == "half a cosine to 0, warm-up 10"
    assert not list(notes(replace(COSINE, steps=50))) and len(list(notes(replace(STEP, steps=50)))) == 1


def test_resuming_a_cosine_with_more_steps_is_noted():
    said = list(notes_of_more_steps(replace(COSINE, steps=200), COSINE, 100))
    assert said == [
        "train.schedule cosine over 200 steps, cosine over 100 until here: the learning rate was 0.000152 and goes on "
        "with 0.271"
    ]
    assert "step over 100 steps, cosine over 100 until here" in next(notes_of_more_steps(STEP, COSINE, 50))
    assert not list(notes_of_more_steps(COSINE, COSINE, 50)) and not list(notes_of_more_steps(COSINE, STEP, 0))


def steps_of(folder):
    recipe = read_recipe(folder).train
    return recipe.steps, recipe.epochs, read_log(folder / "log.jsonl")[-1]["step"]


def test_epochs_of_a_run_and_of_a_resumed_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "doublehead.models", tiny_models())
    for drawing in ("draw_results", "draw_first_batches"):
        monkeypatch.setattr(run, drawing, lambda *args: [])
    monkeypatch.setattr(pictures, "draw_curves", lambda *args: None)
    folder = tmp_path / "run"
    train_main([*TINY[: TINY.index("--train.steps")], *TINY[TINY.index("--train.steps") + 2 :],
                "--train.epochs", "2", "--out", str(folder)])  # fmt: skip
    assert steps_of(folder) == (5, 2.0, 5)  # 18 images, 4 at a time
    assert "note: 2 epochs of 9 images, 4 at a time, are 5 steps\n" in capsys.readouterr().out
    train_main(["--resume", str(folder), "--train.epochs", "3"])
    assert steps_of(folder) == (7, 3.0, 7)
    train_main(["--resume", str(folder), "--train.steps", "8"])
    assert steps_of(folder) == (8, None, 8)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit):
        train_main(["--resume", str(folder), "--train.steps", "9", "--train.epochs", "3"])
    assert "train.steps and train.epochs exclude each other" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
