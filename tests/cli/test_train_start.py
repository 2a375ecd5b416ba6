"""`doublehead train --from`, `--recipe`, `--write-recipe` and `--data.root`: what a training begins with."""

import dataclasses
import json
import shutil

import pytest
import safetensors.torch
import torch

from doublehead.cli.train import parse
from doublehead.config import to_dict
from doublehead.engine import run as run_module
from doublehead.engine.checkpoint import load_state
from doublehead.engine.errors import UserError
from doublehead.engine.training import start, write_recipe
from doublehead.recipes import RECIPES
from tests.support.engine_standin import TINY, checksums, one_thread, tiny_program  # noqa: F401 (a fixture)
from tests.support.layouts import TRAIN, VAL, write_layout

OWN = "--train.steps 2 --data.workers 0 --train.device cpu --train.batch-size 2".split()


@pytest.fixture
def tiny(monkeypatch):
    return tiny_program(monkeypatch)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run on generated shapes."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert tiny_program(patch)(*TINY, "--train.steps", "2", "--out", folder) == 0
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set as Roboflow exports it."""
    return write_layout("coco-roboflow", tmp_path_factory.mktemp("data") / "fruit")


def weights(folder, name="model.safetensors"):
    return safetensors.torch.load_file(folder / name)


# ---------------------------------------------------------------------- one's own data


def test_a_folder_of_data_alone_is_trained_on(data, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert tiny("--data.root", data, *OWN) == 0
    said = capsys.readouterr().out
    assert "own-data: " in said and "data     COCO, Roboflow export: " in said
    recipe = json.loads((tmp_path / "runs" / "own-data-1" / "recipe.json").read_text())
    assert recipe["name"] == "own-data" and recipe["data"]["format"] == "auto" and recipe["train"]["steps"] == 2
    assert recipe["train"]["eval_every"] == 0 and recipe["train"]["warmup_steps"] == 0  # fitted to two steps


def test_pictures_that_are_drawn_do_not_hide_the_users_own(tiny, data, tmp_path, trained, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = checksums(trained.parent)
    for line, again in (
        (["shapes-ext", f"--data.root={data}"], ""),
        (["--recipe", trained / "recipe.json", "--data.root", data], ""),
        (["--resume", trained, "--data.root", data], f" --from {trained}"),
    ):
        assert tiny(*line) == 2
        said = capsys.readouterr().err
        assert "draws its own pictures and would not read that folder" in said and said.count("\n") == 1
        assert said.endswith(f"; to train on it: doublehead train{again} --data.root {data}\n")
        assert not list(tmp_path.iterdir()) and checksums(trained.parent) == before
    assert tiny("--data.root", data, "--data.format", "shapes") == 2
    said = capsys.readouterr().err
    assert f"--data.format shapes draws its own pictures and would not read --data.root {data}: leave one" in said
    with pytest.raises(UserError, match="draws its own pictures"):
        start(RECIPES["shapes-ext"], {"data.root"})
    assert not list(tmp_path.iterdir())


def test_a_recipe_of_drawn_pictures_reads_all_of_the_users_own(data, tmp_path):
    path = tmp_path / "fitted.json"
    command = parse(["shapes-ext", "--data.format", "auto", "--data.root", str(data), "--train.device", "cpu"])
    written = write_recipe(path, command.recipe, command.given, base=command.base)
    assert written.data.train_images is None and written.data.val_images is None
    assert json.loads(path.read_text()) == json.loads(json.dumps(to_dict(written)))


@pytest.mark.parametrize("root", ["missing", "file", "empty"])
def test_a_folder_that_is_no_data_set_is_one_line(root, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    before = checksums(tmp_path)
    for out in ((), ("--out", "empty"), ("--out", "several/new/folders")):
        assert tiny("--data.root", root, *OWN, *out) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and root in said
        assert checksums(tmp_path) == before


# ---------------------------------------------------------------------- from a detector


def test_from_a_run_with_its_classes(trained, tiny, tmp_path, capsys):
    out = tmp_path / "out"
    same = ["--train.steps", "1", "--train.lr", "0", "--train.ema-decay", "0.5"]
    assert tiny("shapes-ext", *TINY, *same, "--from", trained, "--out", out) == 0
    assert f"from     {trained}: all weights\n" in capsys.readouterr().out
    before, now = weights(trained), weights(out)
    parameters = [name for name in before if name.startswith(("classify", "locate")) or name.endswith("0.weight")]
    assert parameters and all(torch.equal(now[name], before[name]) for name in parameters)
    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe["about"].endswith(f"; from {trained}") and recipe["model"]["backbone"]["weights"] is None


def test_own_data_from_a_run_keeps_its_model(trained, data, tiny, tmp_path, capsys):
    out = tmp_path / "out"
    assert tiny("--from", trained, "--data.root", data, *OWN, "--out", out) == 0
    said = capsys.readouterr().out
    assert f"from     {trained}: " in said and "classify, locate new: it has none of this shape" in said
    recipe, before = (json.loads((folder / "recipe.json").read_text()) for folder in (out, trained))
    assert recipe["model"] == before["model"] and recipe["name"] == "own-data"


def test_a_folder_that_has_its_mark_alone_is_new(trained, tiny, tmp_path):
    """Killed between the mark and the recipe, there is nothing to resume."""
    (tmp_path / ".unsaved").write_text("elsewhere\n")
    assert tiny("shapes-ext", *TINY, "--train.steps", "1", "--out", tmp_path) == 0
    assert not (tmp_path / ".unsaved").exists()


class Killed(Exception):
    pass


def killed(*args):
    raise Killed


def test_a_resume_needs_nothing_of_what_the_run_started_from(trained, tiny, tmp_path, monkeypatch):
    source, out = shutil.copytree(trained, tmp_path / "source"), tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run_module.Trainer, "fit", killed)
        tiny("shapes-ext", *TINY, "--train.steps", "1", "--from", source, "--out", out)
    state = load_state(out / "state.pt")
    assert state["step"] == 0 and all(torch.equal(state["model"][name], t) for name, t in weights(source).items())
    shutil.rmtree(source)
    assert tiny("--resume", out) == 0
    assert load_state(out / "state.pt")["step"] == 1 and not list(out.glob(".*"))


def test_killed_before_it_has_its_weights_it_does_not_begin_without_them(trained, tiny, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run_module.Run, "on_save", killed)
        tiny("shapes-ext", *TINY, "--from", trained, "--out", out)
    before = checksums(tmp_path)
    capsys.readouterr()
    assert tiny("--resume", out) == 2
    said = capsys.readouterr().err
    assert "stopped before it had saved the weights that it started from: remove it, and start it again" in said
    assert f"doublehead train --recipe {out}/recipe.json --from {trained}\n" in said and checksums(tmp_path) == before


WRONG = [
    (["--from", "RUN"], "on which data? Give --data.root DIR, a recipe's name first, or --recipe FILE"),
    (["shapes-ext", "--from", "RUN/state.pt"], "this is a training state for --resume; give the model.safetensors"),
    (["shapes-ext", "--from", "RUN/log.jsonl"], "--from RUN/log.jsonl: a JSON file; give the model.safetensors"),
    (["shapes-ext", "--from", "missing"], "--from missing: no such file"),
    (["shapes-ext", "--from", "RUN", "--model.backbone.weights", "x.pth"], "exclude each other"),
    (["--resume", "RUN", "--from", "RUN"], "--from and --resume exclude each other: --resume goes on"),
    (["--resume", "RUN", "--out", "x"], "--out and --resume exclude each other"),
    (
        ["--resume", "RUN", "--recipe", "RUN/recipe.json"],
        "--resume goes on with the run's own recipe: leave '--recipe'",
    ),
    (["--resume", "RUN", "--write-recipe", "x"], "--write-recipe trains nothing: leave --resume and --out out"),
    (["--resume", "RUN", "--model.head.fc-dim", "3"], "weights: doublehead train --recipe RUN/recipe.json --from RUN"),
    (["--resume", "RUN/model.safetensors"], "RUN/model.safetensors is not the folder of a run"),
    (["shapes-ext", "--recipe", "RUN/recipe.json"], "shapes-ext and --recipe RUN/recipe.json exclude each other"),
    (["--recipe", "missing.json"], "--recipe missing.json: cannot be read: No such file"),
    (["--recipe", "RUN/log.jsonl"], "RUN/log.jsonl: not a recipe of this version: "),
    (["--recipe", "wrong.json"], "wrong.json: not a recipe of this version: train.steps is 'many', a whole number"),
    (["--recipe", "newer.json"], "newer.json: not a recipe of this version: unknown TrainConfig fields: speed;"),
    (["shapes-ext", "--write-recipe", "newer.json"], "newer.json: is there already, and is not overwritten"),
    (
        ["shapes-ext", "--write-recipe", "no/such.json", "--train.device", "cpu"],
        "no/such.json: cannot be written: No such",
    ),
]


@pytest.mark.parametrize("line, message", WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_a_wrong_start_is_one_line_and_changes_nothing(trained, tiny, tmp_path, monkeypatch, capsys, line, message):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "RUN")
    recipe = json.loads((trained / "recipe.json").read_text())
    for name, field, value in (("wrong", "steps", "many"), ("newer", "speed", 9)):
        (tmp_path / f"{name}.json").write_text(json.dumps(recipe | {"train": recipe["train"] | {field: value}}))
    before = checksums(tmp_path)
    assert tiny(*line) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and message in said
    assert checksums(tmp_path) == before


# ---------------------------------------------------------------------- recipes in files


def test_a_runs_recipe_trains_another(trained, tiny, tmp_path):
    assert tiny("--recipe", trained / "recipe.json", "--train.steps", "1", "--out", tmp_path / "out") == 0
    before, now = (json.loads((folder / "recipe.json").read_text()) for folder in (trained, tmp_path / "out"))
    scaled = {"steps": 1, "milestones": [4], "warmup_steps": 2}  # of 2, 8 and 4: the schedule keeps its shape
    assert now == before | {"train": before["train"] | scaled}
    assert parse(["--recipe", str(trained)]).recipe.data.train_images == 9  # its folder serves as well


def test_a_fitted_recipe_from_a_file_stays_as_it_is(data, tiny, tmp_path, capsys):
    path = tmp_path / "fitted.json"
    assert tiny("--data.root", data, *OWN, "--write-recipe", path) == 0
    assert f"written: {path}; train it: doublehead train --recipe {path}\n" in capsys.readouterr().out
    fitted = json.loads(path.read_text())
    assert fitted["train"]["steps"] == 2 and list(tmp_path.iterdir()) == [path]
    fitted["train"]["lr"] = 0.125
    path.write_text(json.dumps(fitted))
    assert tiny("--recipe", path, "--out", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "recipe.json").read_text()) == fitted


def test_a_recipe_in_a_file_brings_no_weights_of_a_detector_and_says_so(data, trained, tiny, tmp_path, capsys):
    path, out = tmp_path / "fitted.json", tmp_path / "out"
    assert tiny("--data.root", data, *OWN, "--from", trained, "--write-recipe", path) == 0
    line = f"train it: doublehead train --recipe {path} --from {trained}\n"
    assert line in capsys.readouterr().out
    assert json.loads(path.read_text())["about"].endswith(f"; from {trained}")
    assert tiny("--recipe", path, "--out", out) == 0
    said = capsys.readouterr().out
    assert f"note: the recipe is of a run that started from {trained}: without --from {trained} all weights" in said
    assert "from " not in json.loads((out / "recipe.json").read_text())["about"]
    assert tiny("--recipe", path, "--from", trained, "--out", tmp_path / "again") == 0
    assert "all weights begin at random" not in capsys.readouterr().out


# ---------------------------------------------------------------------- a finished run and other data


def test_a_finished_run_is_not_resumed_on_other_data(data, tiny, tmp_path, capsys):
    out, other = tmp_path / "out", tmp_path / "other"
    assert tiny("--data.root", data, *OWN, "--out", out) == 0
    less = tuple(dataclasses.replace(sample, objects=sample.objects[:1]) for sample in TRAIN[:4])
    write_layout("coco-roboflow", other, less)
    fewer = write_layout("voc", tmp_path / "fewer", TRAIN[1:3], VAL[1:2])
    before = checksums(tmp_path)
    capsys.readouterr()
    for root, message in (
        (other, "was trained on other images: 5 then, 4 now"),
        (fewer, "was trained on other classes: class 1 is 'apple' there and 'banana' in the data"),
    ):
        assert tiny("--resume", out, "--data.root", root) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
        assert said.endswith(f"or begin another run: doublehead train --from {out} --data.root {root}\n")
        assert checksums(tmp_path) == before
    assert tiny("--resume", out, "--data.root", tmp_path / "none") == 2
    said = capsys.readouterr().err
    assert "none: no such folder" in said and said.count("\n") == 1 and checksums(tmp_path) == before
    assert said.endswith(
        f"; to train on other data than the run's: doublehead train --from {out} --data.root {tmp_path}/none\n"
    )
    for options, message in (
        (["--data.classes", "apple", "banana", "cherry"], "data.classes is None there, not ['apple', "),
        (["--data.split-seed", "1"], "data.split_seed is 0 there, not 1"),
        (["--data.val-share", "0.5"], "data.val_share is 0.2 there, not 0.5"),
    ):
        assert tiny("--resume", out, *options) == 2
        said = capsys.readouterr().err
        assert f"{out} holds another run: {message}" in said and checksums(tmp_path) == before
        chosen = " ".join(["", *options]) if "--data.classes" in options else ""
        assert said.endswith(f" doublehead train --from {out} --data.root {data}{chosen}\n")
    moved = shutil.copytree(data, tmp_path / "moved")
    assert tiny("--resume", out, "--data.root", moved) == 0  # its own, elsewhere
