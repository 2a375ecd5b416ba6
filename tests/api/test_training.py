"""`doublehead.train`: its arguments become a recipe with changes, and its name is a module's too."""

import inspect
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import doublehead
from doublehead.api import training
from doublehead.config import TrainConfig, to_dict
from doublehead.engine import training as engine_training
from doublehead.engine.signals import Stopped
from doublehead.errors import UserError
from doublehead.recipes import RECIPES
from tests.support.paths import ROOT

SHAPES = RECIPES["shapes-ext"]


@pytest.fixture
def started(monkeypatch):
    """The calls of `engine.training.start`, none of which trains."""
    calls = []

    def start(recipe, given, **more):
        calls.append((recipe, given, more))
        return engine_training.TrainResult(Path("runs/x"), {"AP": 0.125, "AP50": None})

    monkeypatch.setattr(engine_training, "start", start)
    return calls


def test_changes_reach_the_training_with_the_names_of_what_was_given(started):
    result = doublehead.train(
        "shapes-ext", data={"workers": 0}, train={"steps": 5}, model={"head": {"fc_dim": 8}}, out="o", start_from="~/s"
    )
    ((recipe, given, more),) = started
    assert given == {"data.workers", "train.steps", "model.head.fc_dim"}
    assert (recipe.data.workers, recipe.train.steps, recipe.model.head.fc_dim) == (0, 5, 8)
    assert recipe.train.lr == SHAPES.train.lr
    assert more == {"base": SHAPES, "out": Path("o"), "resume": None, "start_from": Path.home() / "s"}
    assert result.folder == Path("runs/x") and result.model == Path("runs/x/model.safetensors")
    assert repr(result) == "TrainResult('runs/x': AP 12.5)" and result.metrics["AP"] == 0.125


def test_the_best_weights_are_those_of_an_evaluation_on_the_way(tmp_path):
    result = training.TrainResult(tmp_path, {})
    assert result.best == result.model == tmp_path / "model.safetensors"
    (tmp_path / "best.safetensors").touch()
    assert result.best == tmp_path / "best.safetensors"


@pytest.mark.parametrize("data", ["cells", Path("cells"), {"root": "cells"}])
def test_a_folder_alone_is_own_data(started, data, monkeypatch):
    monkeypatch.setitem(RECIPES, "own-data", SHAPES)
    doublehead.train(data=data)
    ((recipe, given, more),) = started
    assert recipe.data.root == "cells" and given == {"data.root"} and more["base"] is SHAPES


def test_recipes_are_names_files_and_objects(started, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(to_dict(SHAPES)))
    for recipe in ("shapes-ext", SHAPES, path, str(path)):
        doublehead.train(recipe)
    assert [recipe for recipe, _, _ in started] == [SHAPES] * 4 and {given for _, given, _ in started} == {frozenset()}


def test_a_resumed_run_has_its_own_recipe(started, tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps(to_dict(SHAPES)))
    doublehead.train(resume=tmp_path, train={"steps": 900})
    assert started[0][0].train.steps == 900 and started[0][2]["resume"] == tmp_path
    with pytest.raises(UserError, match="leave 'shapes-ext' out"):
        doublehead.train("shapes-ext", resume=tmp_path)
    with pytest.raises(UserError, match="is not the folder of a run"):
        doublehead.train(resume=tmp_path / "nowhere")


@pytest.mark.parametrize("arguments, options, error, message", [
    (["shapes-ex"], {}, UserError, "there is no recipe 'shapes-ex'; did you mean 'shapes-ext'"),
    (["."], {}, UserError, r"no recipe '.'; a folder of data is another argument: doublehead.train\(data='.'\)"),
    (["nowhere.json"], {}, UserError, "nowhere.json"),
    ([5], {}, TypeError, "recipe is an? int: expected a recipe's name"),
    ([], {}, UserError, "data is missing: the folder of the data set"),
    (["shapes-ext"], {"train": {"step": 5}}, UserError, "no field train.step; did you mean train.steps"),
    (["shapes-ext"], {"train": 5}, UserError, "train is 5, a dictionary is accepted"),
    (["shapes-ext"], {"data": 5}, UserError, "data is 5, a dictionary is accepted"),
    (["shapes-ext"], {"epochs": 5}, TypeError, r"'epochs' is a field .* recipe's train: give train=\{'epochs': 5\}"),
    (["shapes-ext"], {"crop": 0.5}, TypeError, r"give train=\{'augment': \{'crop': 0.5\}\}"),
    (["shapes-ext"], {"imgsz": 640}, TypeError, "unexpected argument 'imgsz'"),
])  # fmt: skip
def test_what_cannot_be_meant_is_one_line(started, arguments, options, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message) as raised:
        doublehead.train(*arguments, **options)
    assert "\n" not in str(raised.value) and not started and not list(tmp_path.iterdir())


def test_ctrl_c_does_not_end_the_caller(monkeypatch):
    def stopped(number):
        def start(*_, **__):
            raise Stopped(number)

        monkeypatch.setattr(engine_training, "start", start)

    stopped(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        doublehead.train("shapes-ext")
    stopped(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        doublehead.train("shapes-ext")
    assert end.value.code == 143


def test_a_whole_configuration_gives_what_differs(started):
    doublehead.train("shapes-ext", train=TrainConfig(**{**vars(SHAPES.train), "steps": 9}))
    assert started[0][1] == {"train.steps"}


# ---------------------------------------------------------------------- the name, which is a module's too

ORDERS = {
    "the function first": "import doublehead; f = doublehead.train; import doublehead.train; g = doublehead.train",
    "the module first": "import doublehead.train; f = doublehead.train; from doublehead import train as g",
    "a name of the module": "from doublehead.train import main, parse; import doublehead; f = g = doublehead.train",
    "from the package": "from doublehead import train as f; import doublehead; g = doublehead.train",
}
CHECK = """
import inspect, sys
assert not {"torch", "torchvision"} & set(sys.modules)
from doublehead.api import training
import doublehead.cli.train, doublehead.train as h
for name in (f, g, h):
    assert name is sys.modules["doublehead.train"] is doublehead.cli.train
    assert name.main is doublehead.cli.train.main and inspect.signature(name) == inspect.signature(training.train)
    try:
        name("nonsense")
    except ValueError as error:
        assert "there is no recipe 'nonsense'" in str(error)
print("good")
"""


def test_function_and_module_are_one_in_any_order():
    code = "\n".join(f"if sys.argv[1] == {name!r}:\n    {order}" for name, order in ORDERS.items())
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for name in ORDERS:
        command = [sys.executable, "-W", "error", "-c", f"import sys\n{code}\n{CHECK}", name]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert (done.returncode, done.stdout, done.stderr) == (0, "good\n", ""), name


def test_the_package_lists_its_names_without_importing_them():
    code = "import doublehead, sys; print(*dir(doublehead)); assert not {'torch', 'tyro', 'numpy'} & set(sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert set(doublehead.__all__) <= set(shown.stdout.split())
    for name in doublehead.__all__:
        assert getattr(doublehead, name) is not None
    with pytest.raises(AttributeError, match="module 'doublehead' has no attribute 'nonsense'"):
        doublehead.nonsense  # noqa: B018
    assert inspect.signature(doublehead.train) == inspect.signature(training.train)
    assert inspect.getdoc(doublehead.train).startswith("Train a detector, evaluate it")
