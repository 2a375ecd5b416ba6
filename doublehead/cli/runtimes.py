"""What `doublehead detect` runs where that is not the model itself: an exported program, or OpenVINO."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from doublehead.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from doublehead.cli.readouts import ExtGate
    from doublehead.config import Precision
    from doublehead.exporting import ExportedDetector

Runtime = Literal["torch", "openvino"]


class Program(NamedTuple):
    """Something to detect with."""

    model: nn.Module
    """Images in, detections out; on its own device."""
    classes: list[str]
    too_large: Callable[[int, int], str | None] | None = None
    """(height, width) of a picture -> why it cannot be used; None: any size can."""
    dtype: torch.dtype | None = None
    """For autocast; None: the program's own."""


def is_exported(path: str | Path) -> bool:
    """Whether this is a file that `doublehead export` wrote, or calls itself one."""
    path = Path(path)
    if path.suffix.lower() in (".pt2", ".onnx", ".xml"):
        return path.is_file()
    if not (path.is_file() and zipfile.is_zipfile(path)):
        return False
    from doublehead.exporting.package import read_description

    return read_description(path) is not None


def open_model(checkpoint: str, device: torch.device, precision: Precision | None, gate: ExtGate | None) -> Program:
    """Open a checkpoint to run as a model of PyTorch.

    Raises:
        UserError: it cannot be read, or an option does not fit it.
    """
    from doublehead.engine.checkpoint import load_model
    from doublehead.engine.gate_file import set_gate
    from doublehead.engine.precision import set_precision

    model, _, classes, _ = load_model(checkpoint)
    set_gate(checkpoint, model, gate)
    mode = set_precision(model, precision or "fp32", device, checkpoint)
    if mode.note:
        print(f"note: {mode.note}", file=sys.stderr)
    return Program(model.to(device), classes, dtype=mode.dtype)


def open_exported(path: str, device: str, precision: str | None, batch_size: int) -> Program:
    """Open an exported file, for `detect`.

    Raises:
        UserError: it cannot be opened, or an option does not fit it.
    """
    from doublehead.engine.distributed import find_device
    from doublehead.exporting import load
    from doublehead.exporting.as_model import ExportedModel

    wanted = None if device == "auto" else find_device(device)
    detector = load(path, (wanted and wanted.index) or 0, precision)
    if wanted and wanted.type != detector.device.type:
        raise UserError(f"{path}: made for {detector.device.type}, not for --device {device}: leave that out")
    if batch_size > detector.shape[0]:
        raise UserError(f"--batch-size is {batch_size}, and {path} takes {detector.shape[0]} at a time")
    model = ExportedModel(detector)
    return Program(model, detector.classes, model.too_large)


def open_in_openvino(checkpoint: str, device: str, precision: str | None, gate: ExtGate | None) -> Program:
    """Open a checkpoint to run in OpenVINO: it is translated for the sizes of the pictures that come.

    Raises:
        UserError: the checkpoint cannot be read, a package is missing, or an option does not fit.
    """
    from doublehead.engine.checkpoint import load_model
    from doublehead.engine.gate_file import set_gate
    from doublehead.exporting import openvino_file
    from doublehead.exporting.as_model import TranslatedModel
    from doublehead.exporting.description import describe
    from doublehead.exporting.program import DetectorProgram, example_input

    if device not in ("auto", "cpu"):
        raise UserError(f"--device {device}: OpenVINO runs on the CPU: leave --device or --runtime out")
    if precision not in (None, "fp32", "bf16"):
        if precision == "fp16":
            raise UserError("--runtime openvino computes in fp32 or bf16: give one of them")
        raise UserError(
            f"--runtime openvino computes a checkpoint in fp32 or bf16; for int8 first: doublehead export {checkpoint} "
            "model.xml --precision int8"
        )
    openvino_file.check_installed()
    model, recipe, classes, category_ids = load_model(checkpoint)
    set_gate(checkpoint, model, gate)
    program = DetectorProgram(model.detector, plain=True)

    def make(height: int, width: int) -> ExportedDetector:
        from doublehead.exporting.loading import in_openvino

        print(f"translating to OpenVINO for {height} x {width} pixels: this takes about a minute", flush=True)
        example = example_input(1, height, width)
        note = describe("openvino", recipe, classes, category_ids, example[0].shape, "cpu")
        return in_openvino(openvino_file.graph_of(program, example, note), note, precision or "fp32")

    return Program(TranslatedModel(model, make), classes)
