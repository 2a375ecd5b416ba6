"""Checkpoints as trainers leave them: what wrappers put into names, and what stands beside the weights."""

import argparse

import pytest
import torch

from doublehead.cli.convert import main
from doublehead.engine.checkpoint import load_model
from doublehead.engine.errors import CheckpointError
from doublehead.interop.loading import read_checkpoint
from tests.support.torchvision_states import torchvision_state, write


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


STATE = {"backbone.body.conv1.weight": torch.ones(2), "rpn.head.conv.bias": torch.zeros(1)}
WRAPPED = {
    "module.": ["module."],
    "_orig_mod.": ["_orig_mod."],
    "module._orig_mod.": ["module.", "_orig_mod."],
    "_orig_mod.module.": ["_orig_mod.", "module."],
    "module.module.": ["module.", "module."],
    "model.": ["model."],
    "model._orig_mod.": ["model.", "_orig_mod."],
    "model.module._orig_mod.": ["model.", "module.", "_orig_mod."],
    "_fsdp_wrapped_module.": ["_fsdp_wrapped_module."],
}


@pytest.mark.parametrize("prefix", WRAPPED)
@pytest.mark.parametrize("key", [None, "model", "state_dict"])
def test_wrappers_around_a_model(tmp_path, prefix, key):
    content = prefixed(prefix, STATE)
    checkpoint = read_checkpoint(write(tmp_path, content if key is None else {key: content, "epoch": 3}))
    assert list(checkpoint.tensors) == list(STATE)
    assert [note.split("'")[1] for note in checkpoint.notes] == WRAPPED[prefix]
    assert checkpoint.notes[0].startswith(f"dropped the prefix '{WRAPPED[prefix][0]}' of every name (")


INSIDE = {
    "backbone._orig_mod.body.conv1.weight": "backbone.body.conv1.weight",
    "backbone.body.module.conv1.weight": "backbone.body.conv1.weight",
    "module.backbone._orig_mod.body._checkpoint_wrapped_module.conv1.weight": "backbone.body.conv1.weight",
}


@pytest.mark.parametrize("name", INSIDE)
def test_wrappers_within_a_model(tmp_path, name):
    checkpoint = read_checkpoint(write(tmp_path, {name: torch.ones(2), "module.rpn.head.conv.bias": torch.zeros(1)}))
    assert list(checkpoint.tensors) == [INSIDE[name], "rpn.head.conv.bias"]
    assert all("module" in note or "_orig_mod" in note for note in checkpoint.notes) and checkpoint.notes


def test_names_that_would_become_one_stay(tmp_path):
    state = {"a.module.b": torch.ones(1), "a.b": torch.zeros(1)}
    assert list(read_checkpoint(write(tmp_path, state)).tensors) == list(state)
    state = {"module": torch.ones(1)}
    assert list(read_checkpoint(write(tmp_path, state)).tensors) == list(state)


def test_averaged_models(tmp_path):
    averaged = {"n_averaged": torch.tensor(4), **prefixed("module.", STATE)}  # torch.optim.swa_utils.AveragedModel
    checkpoint = read_checkpoint(write(tmp_path, averaged))
    assert list(checkpoint.tensors) == list(STATE)
    assert checkpoint.ignored == {"n_averaged": "how many weights an average was made of"}
    checkpoint = read_checkpoint(write(tmp_path, {"model": STATE, "model_ema": averaged}))
    assert checkpoint.ignored == {"model_ema": "an additional average of the weights"} and not checkpoint.notes
    checkpoint = read_checkpoint(write(tmp_path, {"model_ema": averaged, "epoch": 1}))
    assert list(checkpoint.tensors) == list(STATE) and "'model_ema': an average" in checkpoint.notes[0]


def test_weights_within_an_entry_of_an_entry(tmp_path):
    checkpoint = read_checkpoint(write(tmp_path, {"model": {"state_dict": STATE, "epoch": 2}, "step": 3}))
    assert list(checkpoint.tensors) == list(STATE) and set(checkpoint.ignored) == {"epoch", "step"}


def test_torchvisions_own_training_script(tmp_path, capsys):
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    content = {
        "model": prefixed("module._orig_mod.", torchvision_state(2)),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, [16, 22]).state_dict(),
        "args": argparse.Namespace(data_path="/data", lr_steps=[16, 22], device="cuda", opset=None, amp=False),
        "epoch": 25,
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
    }
    main([str(write(tmp_path, content)), str(tmp_path / "out")])
    assert load_model(tmp_path / "out").classes == ["class 1", "class 2"]
    said = capsys.readouterr().out
    assert "entry 'args' of the file: the training script's arguments" in said
    assert "entry 'scaler' of the file: the loss scale of mixed precision" in said
    assert "dropped the prefix 'module.' of every name (DistributedDataParallel)" in said


class Mine:
    """A class of the user's own script."""


@pytest.mark.parametrize("beside", ["config", "model"])
def test_other_classes_are_refused_by_name(tmp_path, beside):
    content = {"state_dict": STATE, beside: Mine()}
    with pytest.raises(CheckpointError, match=rf"names {__name__}.Mine, which .* Save the weights alone"):
        read_checkpoint(write(tmp_path, content))


def test_weights_that_are_arguments(tmp_path):
    with pytest.raises(CheckpointError, match="'a' is an object of a class that is dropped unread, where a state_dict"):
        read_checkpoint(write(tmp_path, {"model": {"a": argparse.Namespace(x=torch.zeros(1))}}))
    with pytest.raises(CheckpointError, match="holds an object of a class that is dropped unread, not a dictionary"):
        read_checkpoint(write(tmp_path, argparse.Namespace(model=STATE)))
