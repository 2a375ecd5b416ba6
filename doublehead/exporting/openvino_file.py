"""OpenVINO files: the detector as model.xml, with its weights in model.bin, made from its ONNX graph."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .description import NAME
from .onnx_file import write_onnx
from .openvino_import import import_openvino
from .program import DetectorProgram

NEEDED = ("openvino", "onnx", "onnxscript")
WEIGHTS = "weights_sha256"
"""Key of the digest of model.bin in the description: it tells a damaged file, and one that belongs to another."""


def check_installed(int8: bool = False) -> None:
    """
    Raises:
        UserError: a required package is missing.
    """
    from importlib.util import find_spec

    needed = (*NEEDED, "nncf") if int8 else NEEDED
    if missing := [name for name in needed if find_spec(name) is None]:
        raise UserError(f"--format openvino needs {', '.join(missing)}: pip install 'doublehead[openvino]'")


def weights_of(path: Path) -> Path:
    """model.bin, which belongs to model.xml."""
    return path.with_suffix(".bin")


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


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def read(path: Path) -> tuple[Any, str | None]:
    """The `openvino.Model` in a file, and its description as JSON; None: it has none.

    Raises:
        UserError: it is not an OpenVINO file, or damaged, or its weights are missing.
    """
    try:
        openvino = import_openvino()
    except ImportError as error:
        raise UserError(f"{path}: an OpenVINO file; to open it: pip install openvino") from error
    if not weights_of(path).is_file():
        raise UserError(f"{path}: its weights are missing: {weights_of(path).name} belongs beside it")
    try:
        graph = openvino.Core().read_model(path)
    except Exception as error:  # its errors are RuntimeErrors of many lines
        raise UserError(f"{path}: not an OpenVINO file, or damaged ({reason(error)})") from error
    return graph, graph.get_rt_info([NAME]).astype(str) if graph.has_rt_info([NAME]) else None


def check_weights(path: Path, description: dict[str, Any]) -> None:
    """
    Raises:
        UserError: the weights beside `path` are not those it was written with.
    """
    if digest(weights_of(path)) != description.get(WEIGHTS):
        raise UserError(f"{weights_of(path)}: damaged, or not the weights of {path.name}: export again")


def reason(error: Exception) -> str:
    """The last line of one of OpenVINO's messages, which say first where in its source they come from."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def computes_in(precision: str) -> bool:
    """Whether OpenVINO computes in "bf16" or "int8" on this processor by instructions of its own."""
    found = import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return precision.upper() in found


def compiled(graph: Any, precision: str = "fp32", threads: int | None = None) -> Any:
    """An `openvino.CompiledModel` on the CPU.

    Args:
        graph: an `openvino.Model`.
        precision: "fp32" or "bf16", in which float layers compute; bf16 takes effect where the processor has it.
            Quantised layers compute in int8 with either.
        threads: None: as many as PyTorch uses, `torch.get_num_threads()`.
    """
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,  # all threads work on one call, and other calls wait
        "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[
            precision
        ],  # bf16 is its default where there is any
        "ENABLE_CPU_PINNING": False,  # several processes would be pinned to the same cores
    }
    return import_openvino().Core().compile_model(graph, "CPU", settings)
