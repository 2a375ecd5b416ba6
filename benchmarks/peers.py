"""Our detectors exported, under the runtimes that a CPU user would pick instead: onnxruntime and OpenVINO.

One ONNX file of each detector serves both.  Both have all RoIs run the conv-head, and as many threads as PyTorch.
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
import torch
from cpu_rows import BF16, FP32, ONNXRUNTIME, OPENVINO, WHOLE_INT8
from torch import Tensor

from doublehead.exporting import ExportedDetector
from doublehead.exporting.calls import SessionCall
from doublehead.exporting.description import INPUTS, OUTPUTS, describe
from doublehead.exporting.onnx_file import write_onnx
from doublehead.exporting.program import DetectorProgram, example_input
from doublehead.models import DoubleHeadRCNN
from doublehead.recipes import RECIPES

NEEDED = {ONNXRUNTIME: ("onnx", "onnxscript", "onnxruntime"), OPENVINO: ("onnx", "onnxscript", "openvino")}
Call = Callable[[Tensor, Tensor], list[Tensor]]


class Exported:
    """One detector as an ONNX file, and what opens it.

    Args:
        model: with the read-out that is exported.
        images: what it will be given; the file takes batches of their size, and they calibrate int8.
        folder: where the file goes.
    """

    def __init__(self, model: DoubleHeadRCNN, images: list[Tensor], folder: Path) -> None:
        with torch.inference_mode():
            self.batch = model.transform(images)[0]
        shape = self.batch.pixels.shape
        program = DetectorProgram(model.detector, plain=True)
        classes = [str(label) for label in range(1, model.num_classes)]
        recipe = dataclasses.replace(RECIPES["double-head-r50-fpn"], model=model.config)
        self.description = describe("onnx", recipe, classes, range(1, model.num_classes), shape, "cpu")
        self.path = folder / "detector.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PyTorch's exporter, about itself
            example = example_input(shape[0], *shape[2:])
            write_onnx(program, example, self.description, self.path)

    def detector(self, runtime: str, precision: str) -> ExportedDetector:
        """The file under a runtime; images in, detections out, as of the model."""
        call = onnxruntime_call(self.path) if runtime == ONNXRUNTIME else openvino_call(self, precision)
        return ExportedDetector(call, self.description, torch.device("cpu"))


def missing(runtime: str, precision: str) -> str | None:
    """Why this runtime cannot be compared in this precision here; None: it can."""
    if absent := [name for name in NEEDED[runtime] if find_spec(name) is None]:
        return f"needs {', '.join(absent)}"
    if precision == WHOLE_INT8 and find_spec("nncf") is None:
        return "needs nncf"
    if runtime == ONNXRUNTIME and precision != FP32:
        return f"onnxruntime's CPU kernels have no {precision} on x86"
    return None


def onnxruntime_call(path: Path) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()

    def open_session() -> Any:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    return SessionCall(open_session, open_session())


def openvino_call(exported: Exported, precision: str) -> Call:
    import openvino

    core = openvino.Core()
    graph = core.read_model(exported.path)
    if precision == WHOLE_INT8:
        from doublehead.exporting.openvino_int8 import quantised

        logging.getLogger("nncf").setLevel(logging.ERROR)
        graph = quantised(graph, [tuple(exported.batch)])
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,  # all threads for one call
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "bf16" if precision == BF16 else "f32",
        "ENABLE_CPU_PINNING": False,
    }
    request = core.compile_model(graph, "CPU", settings).create_infer_request()

    def call(pixels: Tensor, sizes: Tensor) -> list[Tensor]:
        found = request.infer(dict(zip(INPUTS, (pixels.numpy(), sizes.numpy()), strict=True)))
        return [torch.from_numpy(numpy.array(found[name])) for name in OUTPUTS]

    return call
