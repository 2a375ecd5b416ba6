"""OpenVINO files: the detector as model.xml, with its weights in model.bin, made from its ONNX graph."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UserError
from .description import NAME
from .onnx_file import write_onnx
from .openvino_runtime import WEIGHTS, digest, import_openvino, weights_of
from .program import DetectorProgram

NEEDED = ("openvino", "onnx", "onnxscript")


def check_installed(int8: bool = False) -> None:
    """
    Raises:
        UserError: a required package is missing.
    """
    from importlib.util import find_spec

    needed = (*NEEDED, "nncf") if int8 else NEEDED
    if missing := [name for name in needed if find_spec(name) is None]:
        raise UserError(f"--format openvino needs {', '.join(missing)}: pip install 'doublehead[openvino]'")


def graph_of(program: DetectorProgram, example: tuple[Tensor, ...], description: dict[str, Any]) -> Any:
    """An `openvino.Model` of `program` (plain, on the CPU).

    Raises:
        UserError: an operator of the model cannot be expressed in ONNX.
    """
    core = import_openvino().Core()
    core.set_property({"ENABLE_MMAP": False})  # the weights outlive the file
    with tempfile.TemporaryDirectory(prefix="doublehead-openvino-", ignore_cleanup_errors=True) as folder:
        write_onnx(program, example, description, Path(folder) / "detector.onnx")
        return core.read_model(Path(folder) / "detector.onnx")


def write_openvino(
    program: DetectorProgram, example: tuple[Tensor, ...], description: dict[str, Any], path: Path
) -> None:
    """Write `program` (plain, on the CPU) with its description to `path` (.xml), and its weights beside it (.bin).

    Raises:
        UserError: an operator of the model cannot be expressed in ONNX.
    """
    save(graph_of(program, example, description), description, path)


def save(graph: Any, description: dict[str, Any], path: Path) -> None:
    """Write an `openvino.Model` with its description; the weights keep their precision."""
    openvino = import_openvino()
    openvino.save_model(graph, path, compress_to_fp16=False)
    note = description | {WEIGHTS: digest(weights_of(path))}
    graph.set_rt_info(json.dumps(note), [NAME])
    openvino.save_model(graph, path, compress_to_fp16=False)
