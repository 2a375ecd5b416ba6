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
    **dict.fromkeys(AVERAGED_KEYS, "an additional average of the weights"),
}


@dataclass
class Checkpoint:
    """The contents of a checkpoint file."""

    path: Path
    tensors: dict[str, Tensor]
    """The weights, under the source project's names."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """MMDetection's metadata about the training."""
    ignored: dict[str, str] = field(default_factory=dict)
    """Other entries of the file -> why they are not needed."""
    notes: list[str] = field(default_factory=list)
    """Remarks about the file, for the report."""


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read the weights in `path`, a file written by torch.save, pickle.dump or safetensors.

    The weights may be the whole file or one of its entries, such as "model" or "state_dict".  Prefixes that wrappers
    add to names ("module.", "_orig_mod.", Lightning's "model.") are removed.

    Raises:
        CheckpointError: the file does not exist, is truncated, is not a checkpoint, is a pickle that refers to code,
            or holds no tensors; the message says which.
    """
    path = Path(path)
    try:
        content = read_file(path)
        _refuse_caffe2(path, content)
        state = take_state(path, content)
    except WeightsError as error:
        raise CheckpointError(str(error)) from error
    meta = state.others.get("meta")
    ignored = {name: ENTRY_REASONS.get(name, "not weights of the model") for name in state.others} | state.dropped
    return Checkpoint(path, state.tensors, meta if isinstance(meta, Mapping) else {}, ignored, state.notes)


def _refuse_caffe2(path: Path, content: Any) -> None:
    """Refuse detectors with Caffe2's names, and ResNets, which are not detectors."""
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
