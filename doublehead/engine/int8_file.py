"""`int8.json` beside a checkpoint: which layers run in 8 bits, with which scales, and what that was measured to cost.

The weights are not in it: they are quantised from the checkpoint when it is loaded.  A digest ties the file to those
weights, and a checksum reveals what was changed since it was written.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from doublehead.engine.checkpoint import MODEL_FILE
from doublehead.engine.files import write_json
from doublehead.engine.schema import Mismatch, anything, each, entries, items, number, text, whole
from doublehead.errors import UserError
from doublehead.weights.digest import of_tensors

if TYPE_CHECKING:
    from torch import nn

INT8_FILE = "int8.json"
FORMAT = "doublehead.int8/1"
LONGEST = 16 << 20
"""The size limit of the file in bytes; usual ones have some kilobytes."""

_LEFT_OUT = entries({"layer": text, "AP_before": number(), "AP_after": number(), "output_error": number(0)})
_MEASURED = entries(
    {"fp32": number(), "int8": number(), "int8_all_layers": number(), "images": whole(1), "data": text,
     "ground_truth": text, "readout": each(anything), "bits": whole(1), "rest": text}
)  # fmt: skip
_CONTENT = entries(
    {"format": text, "doublehead": text, "weights": text, "scales": each(number(0)), "left_out": items(_LEFT_OUT),
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
    path = Path(checkpoint)
    if path.is_dir() or path.name == MODEL_FILE:
        return (path if path.is_dir() else path.parent) / INT8_FILE
    return path.with_name(f"{path.stem}.{INT8_FILE}")


def write_int8(path: Path, content: dict[str, Any]) -> None:
    """Write `content` with its format and checksum, atomically."""
    content = {"format": FORMAT} | content
    write_json(path, content | {"checksum": checksum(content)})


def read_int8(checkpoint: str | Path, model: nn.Module) -> Int8Plan:
    """The file of a checkpoint whose weights `model` holds.

    Raises:
        UserError: the model has no layers for int8, there is no file, or it was changed, damaged, or made for other
            weights or by another version.
    """
    from doublehead.models import quantized

    check_has_layers(checkpoint, model)
    path, again = int8_path(checkpoint), f"doublehead quantize {checkpoint}"
    if not path.is_file():
        raise UserError(f"{path}: no such file; make it on some of your images: {again} --data.root DIR")
    content = _content(path, again)
    if content["weights"] != weights_digest(model):
        raise UserError(f"{path}: of other weights than those of {checkpoint}; make it again: {again} --overwrite")
    left_out = [entry["layer"] for entry in content["left_out"]]
    if unknown := [name for name in (*content["scales"], *left_out) if name not in quantized.int8_layers(model)]:
        raise UserError(f"{path}: this version has no int8 layer {unknown[0]}; make it again: {again} --overwrite")
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


def checksum(content: dict[str, Any]) -> str:
    """Of everything but the checksum itself."""
    rest = {name: value for name, value in content.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def weights_digest(model: nn.Module) -> str:
    """Of all weights and statistics of the model."""
    return of_tensors({name: tensor.detach().cpu() for name, tensor in model.state_dict().items()})


def _content(path: Path, again: str) -> dict[str, Any]:
    try:
        if path.stat().st_size > LONGEST:
            raise ValueError("too long")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not str(content.get("format", "")).startswith("doublehead.int8/"):
            raise ValueError("no description of int8 layers")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not what doublehead quantize writes; make it again: {again} --overwrite") from error
    if content["format"] != FORMAT:
        raise UserError(
            f"{path}: in {content['format']}, this version reads {FORMAT}; make it again: {again} --overwrite"
        )
    if content.get("checksum") != checksum(content):
        raise UserError(f"{path}: changed or damaged since it was written; make it again: {again} --overwrite")
    try:
        _CONTENT(content, "")
    except Mismatch as error:
        raise UserError(f"{path}: {error}; make it again: {again} --overwrite") from error
    return content
