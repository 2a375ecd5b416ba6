"""The three commands with the real detector, as small as it gets: they fit together, and a resume is exact."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from doublehead.cli import detect, evaluate, train
from doublehead.config import to_dict
from doublehead.engine.checkpoint import load_model, load_state
from doublehead.engine.distributed import World
from doublehead.engine.files import write_json
from doublehead.engine.run import train as run_training
from doublehead.recipes import RECIPES
from tests.support.engine_standin import one_thread  # noqa: F401 (a fixture)


@pytest.fixture(scope="module")
def recipe():
    base = RECIPES["shapes-ext"]
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, image=dataclasses.replace(base.model.image, min_size=(64,), max_size=64)),
        data=dataclasses.replace(base.data, train_images=6, val_images=2, image_size=64, workers=0),
        train=dataclasses.replace(
            base.train, steps=4, batch_size=2, milestones=(3,), warmup_steps=2, checkpoint_every=2, device="cpu"
        ),
    )


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run_training(recipe, folder, World())
    return folder


def test_a_resumed_training_ends_with_the_same_bits(recipe, whole, tmp_path, capsys):
    half = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, steps=2))
    run_training(half, tmp_path, World())
    write_json(tmp_path / "recipe.json", to_dict(recipe))
    torch.manual_seed(123)
    train.main(["--resume", str(tmp_path)])
    assert "2 -> 4" in capsys.readouterr().out
    one, other = load_state(whole / "state.pt"), load_state(tmp_path / "state.pt")
    assert one["step"] == other["step"] == 4
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, other["model"][name]), name
    for index, entry in one["optimizer"]["state"].items():
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(entry[moment], other["optimizer"]["state"][index][moment])


def test_every_weight_that_learns_has_learnt(recipe, whole):
    state = load_state(whole / "state.pt")
    trained = [entry["exp_avg"].abs().sum() for entry in state["optimizer"]["state"].values()]
    assert len(trained) == sum(len(group["params"]) for group in state["optimizer"]["param_groups"])
    # The non-local block's inner weights get no gradient while its last one is still zero, or nearly.
    assert sum(float(t) > 0 for t in trained) > 0.8 * len(trained)


def test_evaluate_repeats_the_training_s_numbers_and_takes_another_readout(whole, tmp_path, capsys):
    metrics = json.loads((whole / "metrics.json").read_text())
    evaluate.main([str(whole), "--out", str(tmp_path / "fused.json"), "--device", "cpu"])
    assert f"{100 * metrics['AP']:.1f}" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "fused.json").read_text())) == metrics["detections"]
    evaluate.main([str(whole), "--readout", "fc", "--out", str(tmp_path / "fc.json"), "--device", "cpu"])
    assert (tmp_path / "fc.json").read_bytes() != (tmp_path / "fused.json").read_bytes()


def test_detect_finds_what_the_model_finds(whole, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (70, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    options = ["--out", str(tmp_path / "out"), "--score-threshold", "0", "--device", "cpu"]
    detect.main([str(whole), str(tmp_path / "a.png"), *options])
    (entry,) = json.loads((tmp_path / "out" / "detections.json").read_text())["pictures"]
    model, _, classes, _ = load_model(whole)
    with torch.inference_mode():
        (expected,) = model([torch.from_numpy(pixels).permute(2, 0, 1)])
    assert [d["score"] for d in entry["detections"]] == expected["scores"].tolist()
    assert [d["class"] for d in entry["detections"]] == [classes[i - 1] for i in expected["labels"].tolist()]
