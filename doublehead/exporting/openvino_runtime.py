"""OpenVINO without model code: imported without its usage reports, files read, programs compiled."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from .description import NAME

WEIGHTS = "weights_sha256"
"""Key of the digest of model.bin in the description: it tells a damaged file, and one that belongs to another."""

_REPORTS = "openvino_telemetry"


@contextlib.contextmanager
def without_reports() -> Iterator[None]:
    """Inside, `openvino` and `nncf` are imported as where their reports are not installed.

    By default they tell Google Analytics of every import, and leave an identifier in ~/intel, without asking.
    """
    if _REPORTS in sys.modules:  # somebody has decided before
        yield
        return
    sys.modules[_REPORTS] = None  # importing it fails
    try:
        yield
    finally:
        del sys.modules[_REPORTS]


def import_openvino() -> Any:
    """The package `openvino`.

    Raises:
        ImportError: it is not installed.
    """
    with without_reports():
        import openvino
    return openvino


def import_nncf() -> Any:
    """The package `nncf`.

    Raises:
        ImportError: it is not installed.
    """
    with without_reports():
        import nncf
    return nncf


def is_installed() -> bool:
    """Whether OpenVINO can be imported."""
    from importlib.util import find_spec

    return find_spec("openvino") is not None


def weights_of(path: Path) -> Path:
    """model.bin, which belongs to model.xml."""
    return path.with_suffix(".bin")


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
    with open(path, "rb") as file:
        if b"<net" not in file.read(1 << 12):  # OpenVINO would try its other formats, whose parsers print errors
            raise UserError(f"{path}: not an OpenVINO file, or damaged (it describes no <net>)")
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
