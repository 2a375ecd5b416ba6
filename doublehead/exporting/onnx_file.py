"""ONNX files: the detector in standard operators, for onnxruntime, TensorRT and others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from .description import INPUTS, NAME, OUTPUTS
from .onnx_operators import decompositions, translations
from .program import DetectorProgram

OPSET = 18
OPTIMIZE = True
"""Whether to fold constants and simplify the graph; onnxruntime does so on opening, other runtimes may not."""

NEEDED = ("onnx", "onnxscript", "onnxruntime")


def check_installed() -> None:
    """
    Raises:
        UserError: a required package is missing.
    """
    from importlib.util import find_spec

    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise UserError(f"--format onnx needs {', '.join(missing)}: pip install 'doublehead[onnx]'")


def write_onnx(
    program: DetectorProgram, example: tuple[torch.Tensor, ...], description: dict[str, Any], path: Path
) -> None:
    """Write `program` (plain, on the CPU) with its description to `path`, weights inside.

    Raises:
        UserError: an operator of the model cannot be expressed in ONNX.
    """
    levels = len(program.detector.config.rpn.anchor_sizes)
    with torch.no_grad():
        exported = torch.export.export(program, example).run_decompositions(decompositions(levels))
    _check_operators(exported)
    written = torch.onnx.export(
        exported,
        input_names=INPUTS,
        output_names=OUTPUTS,
        opset_version=OPSET,
        dynamo=True,
        optimize=OPTIMIZE,
        custom_translation_table=translations(),
        verbose=False,
    )
    written.model.metadata_props[NAME] = json.dumps(description)
    written.save(path, external_data=False)


def _check_operators(exported: torch.export.ExportedProgram) -> None:
    names = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    if ours := sorted(name for name in names if name.startswith("doublehead.")):
        raise UserError(f"--format onnx: {', '.join(ours)} cannot be expressed in ONNX; --format aoti takes any model")
