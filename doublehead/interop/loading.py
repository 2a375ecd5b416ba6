"""Reads checkpoints of other projects; nothing in a file is executed (see `doublehead.weights`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from ..weights import WeightsError, is_caffe2, read_file, take_state
from ..weights.entries import AVERAGED_KEYS

ENTRY_REASONS = {
    "optimizer": "the optimizer's state",
    "optimizer_states": "the optimizer's state",
    "scheduler": "the learning rate's schedule",
    "lr_scheduler": "the learning rate's schedule",
    "lr_schedulers": "the learning rate's schedule",
    "param_schedulers": "the learning rate's schedule",
    "scaler": "the loss scale of mixed precision",
    "amp_scaler": "the loss scale of mixed precision",
    "message_hub": "logs of the training",
    "args": "the training script's arguments",
    "hyper_parameters": "the training script's arguments",
    "cfg": "the training's configuration",
    "config": "the training's configuration",
    "meta": "notes on the training (class names and conventions were looked for in them)",
    "iteration": "where the training stood",
    "epoch": "where the training stood",
    "global_step": "where the training stood",
    "loops": "where the training stood",
    "callbacks": "states of the trainer's callbacks",
    "__author__": "a note",
    **dict.fromkeys(AVERAGED_KEYS, "an average of the weights beside the weights"),
}


@dataclass
class Checkpoint:
    """What was read."""

    path: Path
    tensors: dict[str, Tensor]
    """The weights, by the source's names."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """MMDetection's notes on the training."""
    ignored: dict[str, str] = field(default_factory=dict)
    """Entries of the file beside the weights -> why they are not needed."""
    notes: list[str] = field(default_factory=list)
    """What was noticed while reading."""


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read the weights of `path`: what torch.save, pickle.dump or safetensors wrote.

    The weights may be the whole file or an entry of it, such as "model" or "state_dict"; what wrappers put into the
    names ("module.", "_orig_mod.", Lightning's "model.") is dropped.

    Raises:
        CheckpointError: no such file, truncated, no checkpoint, a pickle that names code, or no tensors in it; the
            message says which.
    """
    path = Path(path)
    try:
        content = read_file(path)
        _refuse_caffe2(path, content)
        state = take_state(path, content)
    except WeightsError as error:
        raise CheckpointError(str(error)) from error
    meta = state.beside.get("meta")
    ignored = {name: ENTRY_REASONS.get(name, "not weights of the model") for name in state.beside} | state.dropped
    return Checkpoint(path, state.tensors, meta if isinstance(meta, Mapping) else {}, ignored, state.notes)


def _refuse_caffe2(path: Path, content: Any) -> None:
    """Detectors under Caffe2's names, and ResNets, which are no detectors."""
    if isinstance(content, Mapping) and content.get("matching_heuristics"):
        raise CheckpointError(
            f"{path}: weights with Caffe2's names, which Detectron2 matches by guessing; save the model once in "
            "Detectron2 (DetectionCheckpointer.save) and convert that file. A ResNet alone: a training starts from it "
            "with --model.backbone.weights"
        )
    if is_caffe2(content):
        raise CheckpointError(
            f"{path}: Caffe2 blobs of the first Detectron; Detectron2's and newer files are accepted. A ResNet alone: "
            "a training starts from it with --model.backbone.weights"
        )
