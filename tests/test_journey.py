"""From data to a deployed detector in Python, by the scripts in examples/, on one small set: each leads to the next."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image

import doublehead
from doublehead.exporting import onnx_file
from tests.support.engine_standin import one_thread  # noqa: F401 (a fixture)
from tests.support.export_samples import half_resnet18
from tests.support.paths import ROOT

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module", autouse=True)
def desk(tmp_path_factory):
    """An empty current folder, no GPU, and a ResNet-18 of half its depth."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("desk"))
        patch.syspath_prepend(EXAMPLES)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torchvision.models, "resnet18", half_resnet18)
        patch.setattr(onnx_file, "OPTIMIZE", False)  # takes long; tests/exporting has it
        yield


@pytest.fixture(scope="module")
def run(desk):
    """The folder of a run, trained by an example on data that another one made."""
    import sample_data

    data = sample_data.make_data(train=6, val=2)
    assert sorted(path.name for path in data.rglob("*.json")) == ["instances_train.json", "instances_val.json"]
    example("train_own_data", data, "--steps", 1, "--side", 64, "--out", "runs/example")
    return Path("runs/example")


def example(name, *arguments):
    """Run a script of examples/ as `python examples/NAME.py ARGUMENTS` does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def test_there_are_five_examples_of_a_page():
    scripts = {path.stem: path.read_text().splitlines() for path in EXAMPLES.glob("*.py")}
    assert len(scripts.keys() - {"sample_data"}) == 5 and all(len(lines) < 41 for lines in scripts.values())
    assert all(lines[0].startswith('"""') for lines in scripts.values())


def test_train_and_evaluate(run):
    metrics = json.loads((run / "metrics.json").read_text())
    measured = doublehead.load(run).evaluate(progress=False)
    assert measured["images"] == 2 and measured["AP"] == pytest.approx(metrics["AP"])
    assert doublehead.load(run).evaluate("data/shapes", split="train", progress=False)["images"] == 6


def test_fine_tune(run, capsys):
    example("fine_tune", "--steps", 1, "--out", "runs/tuned")  # from runs/example
    tuned = doublehead.load("runs/tuned")
    assert tuned.classes == ["star", "ring"]
    assert capsys.readouterr().out.splitlines()[-1].startswith("runs/tuned: AP50 ")


def test_predict_and_draw(run, capsys):
    example("predict_and_draw", "--score-threshold", 0.01)  # with runs/example, on the pictures of data/shapes
    pictures = sorted(Path("data/shapes/val").iterdir())
    found = doublehead.load(run).predict(pictures, score_threshold=0.01)
    assert len(capsys.readouterr().out.splitlines()) == sum(map(len, found)) > 0
    assert sorted(path.name for path in Path("found").iterdir()) == [
        f"{i}-{p.stem}.jpg" for i, p in enumerate(pictures, 1)
    ]
    assert Image.open("found/1-val-000001.jpg").size == (128, 128)


def test_export_and_deploy(run, capsys):
    pytest.importorskip("onnxscript", reason="pip install 'doublehead[onnx]'")
    pytest.importorskip("onnxruntime", reason="pip install 'doublehead[onnx]'")
    example("export_and_deploy")  # runs/example to detector.onnx
    assert "checked against the model on a random input: the same" in capsys.readouterr().out
    program, model = doublehead.load("detector.onnx"), doublehead.load(run)
    assert program.classes == model.classes and program.exported.shape == (1, 128, 128)
    pictures = sorted(Path("data/shapes/val").iterdir())
    for one, other in zip(program.predict(pictures, 0.01), model.predict(pictures, 0.01), strict=True):
        assert len(one) == len(other) > 0 and one.size == other.size
        # Pictures become 64 x 64, and the program pads them to 128 x 128: at the border convolutions see other zeros.
        torch.testing.assert_close(one.scores, other.scores, atol=0.05, rtol=0)


def test_speed_up_torchvision(capsys):
    example("speed_up_torchvision", "--model", "fasterrcnn_mobilenet_v3_large_320_fpn", "--side", 64)
    assert "objects, the same: " in capsys.readouterr().out
