"""Checkpoints: whole or absent, complete, and clear about what is wrong with a file."""

import contextlib
import dataclasses
import json
import os
import pickle
import resource
import sys

import pytest
import safetensors.torch
import torch

from doublehead.config import BackboneConfig, ModelConfig, Recipe, to_dict
from doublehead.engine.checkpoint import load_model, load_state, save_model, save_state
from doublehead.engine.errors import CheckpointError, UserError
from doublehead.engine.files import new_run_folder, read_recipe, replacing, write_json
from tests.support.engine_standin import TinyDetector, one_thread, tiny_models  # noqa: F401 (a fixture)

RECIPE = Recipe(name="mine", model=ModelConfig(backbone=BackboneConfig(weights="imagenet", frozen_stages=1)))


@pytest.fixture
def built(monkeypatch):
    """The configurations that detectors were built from."""
    seen = []
    monkeypatch.setitem(sys.modules, "doublehead.models", tiny_models(seen))
    return seen


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(5)
    model = TinyDetector(3).to(memory_format=torch.channels_last)
    model(torch.rand(1, 3, 32, 32).unbind(), [{"boxes": torch.ones(1, 4), "labels": torch.tensor([1])}])
    path = tmp_path / "model.safetensors"
    save_model(path, model, RECIPE, ["a", "b"], [2, 5], step=70)
    return model, path


@contextlib.contextmanager
def full_disk(limit=2000):
    """Files cannot grow beyond `limit` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_model_comes_back_with_its_recipe_and_labels(saved, built):
    model, path = saved
    for place in (path, path.parent, str(path)):  # a run's folder will do
        loaded, recipe, classes, category_ids = load_model(place)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, loaded.state_dict()[name]), name
        assert recipe == RECIPE and classes == ["a", "b"] and category_ids == [2, 5]
        assert not loaded.training
    # Its weights are in the file: none are fetched.
    assert built[0].backbone == dataclasses.replace(RECIPE.model.backbone, weights=None)


def test_the_header_describes_the_file_to_anyone(saved):
    with safetensors.safe_open(saved[1], "pt") as file:
        header = file.metadata()
    assert json.loads(header["recipe"]) == json.loads(json.dumps(to_dict(RECIPE)))
    assert header["step"] == "70" and header["version"]


def rewritten(path, metadata=None, change=None):
    with safetensors.safe_open(path, "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header.update(metadata or {})
    safetensors.torch.save_file(change(tensors) if change else tensors, path, {k: v for k, v in header.items() if v})


BROKEN = {
    "missing": (lambda path: path.unlink(), "no such file"),
    "empty": (lambda path: path.write_bytes(b""), "an empty file"),
    "text": (lambda path: path.write_text("hello, I am a text of some length"), "not a safetensors file, or truncated"),
    "truncated": (
        lambda path: os.truncate(path, 1500 + path.stat().st_size // 2),
        "not a safetensors file, or truncated",
    ),
    "foreign": (lambda path: rewritten(path, {"format": "pt"}), "not a model of doublehead"),
    "newer": (lambda path: rewritten(path, {"format": "doublehead.model/2"}), "doublehead.model/2, this version reads"),
    "recipe": (lambda path: rewritten(path, {"recipe": '{"colour": 1}'}), "unknown Recipe fields: colour"),
    "no recipe": (lambda path: rewritten(path, {"recipe": ""}), "description cannot be used"),
    "lacks a key": (
        lambda path: rewritten(path, change=lambda t: {k: v for k, v in t.items() if k != "classify.bias"}),
        "missing classify.bias",
    ),
    "strange key": (lambda path: rewritten(path, change=lambda t: t | {"x": torch.ones(1)}), "unexpected x"),
    "wrong shape": (
        lambda path: rewritten(path, change=lambda t: t | {"classify.bias": torch.ones(4)}),
        r"classify.bias has shape \(4,\), the recipe's model \(3,\)",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_cannot_be_used_is_named_with_the_reason(saved, built, kind):
    path = saved[1]
    breaking, message = BROKEN[kind]
    breaking(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(path)
    assert str(path) in str(caught.value)


def test_a_folder_or_a_training_state_in_its_place(tmp_path, built):
    with pytest.raises(CheckpointError, match="has no model.safetensors"):
        load_model(tmp_path)
    save_state(tmp_path / "state.pt", {})
    with pytest.raises(CheckpointError, match="for --resume; give the model.safetensors"):
        load_model(tmp_path / "state.pt")


def test_a_state_comes_back(tmp_path):
    model = {"a": torch.arange(5.0), "b": torch.ones(2, 3, dtype=torch.bfloat16).t()}
    state = {
        "step": 3, "evaluated_step": -1, "seconds": 1.5, "model": model, "scaler": {}, "average": None,
        "optimizer": {"state": {}, "param_groups": []}, "losses": {"sums": {}, "steps": 0},
        "machine": {"processes": 1, "threads": 2, "device": "cpu"},
    }  # fmt: skip
    save_state(tmp_path / "state.pt", state)
    loaded = load_state(tmp_path / "state.pt")
    assert all(torch.equal(tensor, loaded["model"].pop(name)) for name, tensor in state.pop("model").items())
    assert loaded == state | {"format": "doublehead.state/1", "model": {}}


def test_old_and_new_states_come_back_bit_for_bit(tmp_path):
    """With a digest and without; of every type that training makes, and in the memory order that it made."""
    conv = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(conv.parameters(), amsgrad=True)
    conv(torch.ones(1, 3, 4, 4)).sum().backward()
    optimizer.step()
    tensors = {
        "bf16": torch.randn(5).bfloat16(), "half": torch.randn(3).half(), "NaN": torch.tensor([torch.nan, -0.0]),
        "count": torch.tensor(2**40), "truth": torch.tensor([True, False]), "byte": torch.arange(4, dtype=torch.uint8),
        "none": torch.zeros(0, 3), "number": torch.tensor(0.1, dtype=torch.float64), **conv.state_dict(),
    }  # fmt: skip
    state = {
        "format": "doublehead.state/1", "step": 3, "evaluated_step": -1, "seconds": 1.5, "model": tensors,
        "scaler": {}, "average": None, "optimizer": optimizer.state_dict(), "losses": {"sums": {}, "steps": 0},
        "machine": {"processes": 1, "threads": 2, "device": "cpu"},
    }  # fmt: skip
    torch.save(state, tmp_path / "old.pt")
    save_state(tmp_path / "new.pt", state)
    for name in ("old.pt", "new.pt"):
        loaded = load_state(tmp_path / name)
        assert repr(loaded) == repr({**state, "model": dict(tensors)})
        moments = [(loaded["optimizer"]["state"][i][key], value)
                   for i, memory in state["optimizer"]["state"].items() for key, value in memory.items()]  # fmt: skip
        for found, expected in [*moments, *((loaded["model"][key], value) for key, value in tensors.items())]:
            assert found.dtype == expected.dtype and found.stride() == expected.stride()
            assert found.flatten().view(torch.uint8).equal(expected.flatten().view(torch.uint8))


def test_no_two_numbers_of_a_state_share_memory(tmp_path):
    """The optimiser goes on in the memory that was read: what is shared would be trained twice a step."""
    numbers = torch.arange(8.0)
    shared = {"a": numbers[:4], "b": numbers[2:6], "c": numbers.as_strided((4,), (0,)), "d": numbers, "e": numbers}
    state = {
        "step": 3, "evaluated_step": -1, "seconds": 1.5, "model": shared, "scaler": {}, "average": None,
        "optimizer": {"state": {}, "param_groups": []}, "losses": {"sums": {}, "steps": 0},
        "machine": {"processes": 1, "threads": 2, "device": "cpu"},
    }  # fmt: skip
    save_state(tmp_path / "state.pt", state)
    loaded = load_state(tmp_path / "state.pt")["model"]
    for name, tensor in loaded.items():
        assert torch.equal(tensor, shared[name])
    for tensor in loaded.values():
        tensor += 1
    for name, tensor in loaded.items():
        assert torch.equal(tensor, shared[name] + 1)


class Command:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_state_is_never_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for write in (
        lambda path: torch.save(Command(), path),
        lambda path: path.write_bytes(pickle.dumps(Command(), protocol=2)),
    ):
        write(tmp_path / "state.pt")
        with pytest.raises(CheckpointError, match="not a training state"):
            load_state(tmp_path / "state.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kind", ["missing", "truncated", "foreign"])
def test_a_state_that_cannot_be_used_is_named(tmp_path, kind):
    path = tmp_path / "state.pt"
    if kind != "missing":
        save_state(path, {"tensor": torch.ones(1000)})
    if kind == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    if kind == "foreign":
        torch.save({"model": {}}, path)
    with pytest.raises(CheckpointError, match="state.pt"):
        load_state(path)


def test_a_full_disk_leaves_the_old_checkpoint(saved, tmp_path, built):
    model, path = saved
    save_state(tmp_path / "state.pt", {"step": 1})
    before = path.read_bytes(), (tmp_path / "state.pt").read_bytes()
    with full_disk():
        with pytest.raises(CheckpointError, match="model.safetensors: cannot be written: .*untouched"):
            save_model(path, TinyDetector(9), RECIPE, ["a", "b"], [2, 5])
        with pytest.raises(CheckpointError, match="state.pt: cannot be written: File too large; what .* untouched"):
            save_state(tmp_path / "state.pt", {"step": 2, "tensor": torch.ones(10000)})
    assert (path.read_bytes(), (tmp_path / "state.pt").read_bytes()) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "state.pt"]


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(CheckpointError, match="absent/state.pt: cannot be written"):
        save_state(tmp_path / "absent" / "state.pt", {"tensor": torch.ones(3)})
    with pytest.raises(CheckpointError, match="absent/model.safetensors: cannot be written"):
        save_model(tmp_path / "absent" / "model.safetensors", TinyDetector(3), RECIPE, ["a", "b"], [1, 2])


def test_a_recipe_that_could_not_be_read_again_is_not_written(tmp_path):
    recipe = dataclasses.replace(RECIPE, train=dataclasses.replace(RECIPE.train, steps=0))
    with pytest.raises(CheckpointError, match="not written: train.steps is 0, a whole number of"):
        save_model(tmp_path / "model.safetensors", TinyDetector(3), recipe, ["a", "b"], [1, 2])
    assert not list(tmp_path.iterdir())


def test_replacing_is_all_or_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyError), replacing(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path and path.read_text() == "old"
        raise KeyError
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_the_content_reaches_the_disk_before_the_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: calls.append(name) or real(*a))
    write_json(tmp_path / "x.json", [1])
    assert calls == ["fsync", "replace", "fsync"]


def test_json_refuses_nan(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", float("nan"))
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- run folders


def test_runs_are_numbered_and_never_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [str(new_run_folder("name")) for _ in range(3)] == ["runs/name-1", "runs/name-2", "runs/name-3"]
    (tmp_path / "empty").mkdir()
    assert new_run_folder("name", "empty").is_dir() and new_run_folder("name", "a/b/c").is_dir()
    (tmp_path / "empty" / "file").touch()
    with pytest.raises(UserError, match="empty already holds files.*--resume empty"):
        new_run_folder("name", "empty")
    with pytest.raises(UserError, match="cannot create the run folder .*empty/file"):
        new_run_folder("name", "empty/file/run")


def test_the_recipe_of_a_run(tmp_path):
    write_json(tmp_path / "recipe.json", to_dict(RECIPE))
    assert read_recipe(tmp_path) == RECIPE
    (tmp_path / "recipe.json").write_text('{"name": ')
    with pytest.raises(UserError, match="recipe.json: not a recipe"):
        read_recipe(tmp_path)
    with pytest.raises(UserError, match="is not the folder of a run"):
        read_recipe(tmp_path / "absent")
