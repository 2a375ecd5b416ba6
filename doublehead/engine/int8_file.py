"""`int8.json` beside a checkpoint: which layers run in 8 bits, with which scales, and what that was measured to cost.

The weights are not in it: they are quantised from the checkpoint when it is loaded.  A digest ties the file to those
weights, and a checksum reveals what was changed since it was written.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from doublehead.engine.schema import Mismatch, anything, each, entries, items, number, text, whole
from doublehead.engine.sealed import path_beside, read_sealed, write_sealed
from doublehead.errors import CheckpointError, UserError
from doublehead.weights.digest import of_weights

if TYPE_CHECKING:
    from torch import nn

INT8_FILE = "int8.json"
FORMAT = "doublehead.int8/1"

_LEFT_OUT = entries({"layer": text, "AP_before": number(), "AP_after": number(), "output_error": number(0)})
_MEASURED = entries(
    {"fp32": number(), "int8": number(), "int8_all_layers": number(), "images": whole(1), "data": text,
     "ground_truth": text, "readout": each(anything), "bits": whole(1), "rest": text}
)  # fmt: skip
_CONTENT = entries(
    {"doublehead": text, "weights": text, "scales": each(number(0)), "left_out": items(_LEFT_OUT),
     "measured": _MEASURED, "calibration": entries({"images": whole(1), "data": text}), "most_loss": number(0)}
)  # fmt: skip


class Int8Plan(NamedTuple):
    """What a file says."""

    scales: dict[str, float]
    """Layer name -> scale of its input, of all layers that were measured."""
    left_out: list[str]
    """Layers that stay in float."""
    measured: dict[str, Any]
    """AP of fp32 and of int8, 0 .. 1, and on which data, read-out and kind of processor."""


def int8_path(checkpoint: str | Path) -> Path:
    """Where the file of a checkpoint lies: RUN/int8.json; beside RUN/best.safetensors it is RUN/best.int8.json."""
    return path_beside(checkpoint, INT8_FILE)


def write_int8(path: Path, content: dict[str, Any]) -> None:
    """Write `content` with its format and checksum, atomically."""
    write_sealed(path, FORMAT, content)


def read_int8(checkpoint: str | Path, model: nn.Module) -> Int8Plan:
    """The file of a checkpoint whose weights `model` holds.

    Raises:
        UserError: the model has no layers for int8.
        CheckpointError: there is no file, or it was changed, damaged, or made for other weights or by another version.
    """
    from doublehead.models import quantized

    check_has_layers(checkpoint, model)
    path, again = int8_path(checkpoint), f"doublehead quantize {checkpoint}"
    content = read_sealed(path, FORMAT, again)
    try:
        _CONTENT(content, "")
    except Mismatch as error:
        raise CheckpointError(f"{path}: {error}; make it again: {again} --overwrite") from error
    if content["weights"] != of_weights(model.state_dict()):
        raise CheckpointError(
            f"{path}: of other weights than those of {checkpoint}; make it again: {again} --overwrite"
        )
    left_out = [entry["layer"] for entry in content["left_out"]]
    if unknown := [name for name in (*content["scales"], *left_out) if name not in quantized.int8_layers(model)]:
        raise CheckpointError(
            f"{path}: this version has no int8 layer {unknown[0]}; make it again: {again} --overwrite"
        )
    return Int8Plan(content["scales"], left_out, content["measured"])


def check_has_layers(checkpoint: str | Path, model: nn.Module) -> None:
    """
    Raises:
        UserError: nothing of the model can run in 8 bits.
    """
    from doublehead.models import quantized

    if not quantized.int8_layers(model):
        kind = model.config.head.kind
        raise UserError(f"{checkpoint}: its head is {kind!r}, which has no int8 layers: conv- and fc-heads have them")
