"""Opens whatever holds a detector: a run, a checkpoint, an exported program."""

from __future__ import annotations

import os
import warnings
import zipfile
from pathlib import Path

import torch

from doublehead.config import Precision
from doublehead.engine.checkpoint import load_model
from doublehead.engine.distributed import find_device
from doublehead.engine.gate_file import set_gate
from doublehead.engine.precision import set_precision
from doublehead.errors import UserError
from doublehead.exporting import load as load_exported
from doublehead.exporting.package import read_description
from doublehead.recipes import RECIPES

from .predictor import Predictor


def load(
    path: str | os.PathLike,
    device: str | torch.device = "auto",
    *,
    precision: Precision = "fp32",
    ext_gate: float | str | None = None,
) -> Predictor:
    """See `doublehead.load`."""
    if not isinstance(path, (str, os.PathLike)):
        hint = "; a result of doublehead.train has load()" if hasattr(path, "folder") else ""
        raise TypeError(f"path is a {type(path).__name__}: expected the path of a run's folder or of a file{hint}")
    path = Path(path).expanduser()
    if str(path) in RECIPES and not path.exists():
        raise UserError(
            f"{path} is the name of a recipe: train it first, doublehead.train({str(path)!r}), and load its run"
        )
    if _is_exported(path):
        if ext_gate is not None:
            raise UserError(f"{path}: an exported program has the gate that it was exported with: leave ext_gate out")
        return _open_exported(path, str(device), precision)
    where = find_device(str(device))
    model, recipe, classes, _ = load_model(path)
    set_gate(path, model, ext_gate)
    mode = set_precision(model, precision, where, path)
    if mode.note:
        warnings.warn(mode.note, stacklevel=3)
    return Predictor(path, classes, where, model=model.to(where), recipe=recipe, mode=mode)


def _is_exported(path: Path) -> bool:
    if path.suffix.lower() in (".pt2", ".onnx", ".xml"):
        return not path.is_dir()
    return path.is_file() and zipfile.is_zipfile(path) and read_description(path) is not None


def _open_exported(path: Path, device: str, precision: Precision) -> Predictor:
    """Open an exported program on the device it was made for.

    In "fp32" it computes as it was exported.

    Raises:
        UserError: another device is asked for; or see `doublehead.exporting.load`.
    """
    wanted = None if device == "auto" else find_device(device)
    index = (wanted.index or 0) if wanted and wanted.type == "cuda" else 0
    exported = load_exported(path, index, None if precision == "fp32" else precision)
    if wanted and wanted.type != exported.device.type:
        made_for = exported.device.type
        raise UserError(f"{path}: made for {made_for}, not for {device!r}: leave device out, or export again")
    return Predictor(path, exported.classes, exported.device, exported=exported)
