"""The same model as its users may run it without us: our exported graph under onnxruntime and OpenVINO."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from doublehead.config import Recipe
from doublehead.exporting import ExportedDetector, onnx_file
from doublehead.exporting.calls import SessionCall
from doublehead.exporting.description import describe
from doublehead.exporting.loading import openvino_call
from doublehead.exporting.program import DetectorProgram, example_input

NAMES = ("onnxruntime", "OpenVINO fp32", "OpenVINO bf16", "OpenVINO int8")


class Peers(NamedTuple):
    """What runs here, and what does not."""

    calls: dict[str, Callable[[], list[dict[str, Tensor]]]]
    """Name -> the call: from pictures to detections, as `model(images)`."""
    missing: dict[str, str]
    """Name -> why it cannot run here."""


def peers(model: nn.Module, images: Sequence[Tensor], names: Sequence[str] = NAMES) -> Peers:
    """One of our detectors, exported for the size that its own batch of `images` has, on as many threads as PyTorch.

    Args:
        model: a `DoubleHeadRCNN` on the CPU, with the read-out to measure; every RoI passes every head.
        images: each `Tensor[3, H, W]`; by them int8's ranges are calibrated too.
        names: those to prepare, of `NAMES`.
    """
    calls: dict[str, Callable] = {}
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="doublehead-peers-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "detector.onnx"
        try:
            onnx_file.check_installed()
            note = write(model, images, path)
        except Exception as error:
            return Peers({}, dict.fromkeys(names, str(error)))
        graph = None
        for name in names:
            try:
                if name == "onnxruntime":
                    detector = in_onnxruntime(path, note)
                else:
                    graph = graph or read(path)
                    detector = in_openvino(graph, note, name.split()[1], model, images)
            except Exception as error:
                missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            else:
                calls[name] = lambda detector=detector: detector.detect(images)
    return Peers(calls, missing)


def write(model: nn.Module, images: Sequence[Tensor], path: Path) -> dict[str, Any]:
    """The ONNX file; returns its description."""
    with torch.inference_mode():
        shape = model.transform(images)[0].pixels.shape
    program = DetectorProgram(model.detector, plain=True)
    recipe = Recipe(name="benchmark", model=model.config)
    last = max(head.classifier.out_features for head in model.detector.heads.values() if head.classifier is not None)
    classes = [str(label) for label in range(1, last)]
    note = describe("onnx", recipe, classes, range(1, last), shape, "cpu")
    onnx_file.write_onnx(program, example_input(shape[0], *shape[2:]), note, path)
    return note


def in_onnxruntime(path: Path, note: dict[str, Any]) -> ExportedDetector:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()

    def open_session() -> Any:
        return onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])

    return ExportedDetector(SessionCall(open_session, open_session()), note, torch.device("cpu"))


def read(path: Path) -> Any:
    """The file as an `openvino.Model`."""
    from doublehead.exporting.openvino_runtime import import_openvino

    core = import_openvino().Core()
    core.set_property({"ENABLE_MMAP": False})  # the weights outlive the file
    return core.read_model(path)


def in_openvino(
    graph: Any, note: dict[str, Any], precision: str, model: nn.Module, images: Sequence[Tensor]
) -> ExportedDetector:
    """
    Raises:
        RuntimeError: the processor does not compute in this precision.
    """
    if precision == "int8":
        from doublehead.exporting.openvino_int8 import quantised

        with torch.inference_mode():
            graph = quantised(graph, [tuple(model.transform(images)[0])])
    with warnings.catch_warnings(record=True):
        call, used = openvino_call(graph, precision)
    if used != precision:
        raise RuntimeError(f"OpenVINO does not compute in {precision} on this processor")
    return ExportedDetector(call, note, torch.device("cpu"), used)
