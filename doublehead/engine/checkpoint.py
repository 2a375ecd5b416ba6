"""What a run leaves on disk: `model.safetensors` to use, `state.pt` to continue from.

`model.safetensors` holds the weights (the averaged ones where averaging is on) and, in its
header, all that is needed to rebuild the detector: the recipe, the classes, the category ids.
`state.pt` holds everything a resumed training needs; it contains tensors and plain values only.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import nn

import doublehead
from doublehead.config import Recipe, from_dict, to_dict
from doublehead.engine.errors import CheckpointError
from doublehead.engine.files import replacing

MODEL_FILE = "model.safetensors"
STATE_FILE = "state.pt"
_STATE_FORMAT = "doublehead.state/1"
_MODEL_FORMAT = "doublehead.model/1"


class LoadedModel(NamedTuple):
    """A detector read from a file, and what its labels mean."""

    model: nn.Module
    """In eval mode, on the CPU."""
    recipe: Recipe
    classes: list[str]
    """Label i is `classes[i - 1]`; label 0 is background."""
    category_ids: list[int]
    """Label i is category `category_ids[i - 1]` of the data set it was trained on."""


def save_model(
    path: str | Path,
    model: nn.Module,
    recipe: Recipe,
    classes: Sequence[str],
    category_ids: Sequence[int],
    step: int = 0,
) -> None:
    """Write `model`'s weights and their description to `path`, atomically.

    Raises:
        CheckpointError: the file cannot be written (disk full, no permission); an older one stays.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    metadata = {
        "format": _MODEL_FORMAT,
        "version": getattr(doublehead, "__version__", "unknown"),
        "step": str(step),
        "recipe": json.dumps(to_dict(recipe)),
        "classes": json.dumps(list(classes)),
        "category_ids": json.dumps([int(i) for i in category_ids]),
    }
    try:
        with replacing(path) as temporary:
            # Not `save_file`: it has a temporary file of its own, which a killed process would leave behind.
            temporary.write_bytes(safetensors.torch.save(tensors, metadata))
    except OSError as error:
        raise _cannot_write(path, error) from error


def load_model(path: str | Path) -> LoadedModel:
    """Rebuild the detector that `save_model` wrote.

    Args:
        path: a `model.safetensors`, or the folder of a run that holds one.

    Raises:
        CheckpointError: no such file, not a file of this library, damaged, or weights that do not
            fit the recipe inside it.
    """
    path = _find_model(Path(path))
    metadata, tensors = _read_safetensors(path)
    from doublehead.models import build_detector  # only here: it brings torchvision

    try:
        recipe = from_dict(json.loads(metadata["recipe"]))
        classes, category_ids = json.loads(metadata["classes"]), json.loads(metadata["category_ids"])
        model = build_detector(_without_download(recipe).model, len(classes) + 1)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: its description cannot be used ({error}); "
            f"written by doublehead {metadata.get('version', 'unknown')}"
        ) from error
    _load_weights(model, tensors, path)
    return LoadedModel(model.eval(), recipe, classes, category_ids)


def save_state(path: str | Path, state: dict[str, Any]) -> None:
    """Write a training state (tensors and plain values) to `path`, atomically.

    Raises:
        CheckpointError: the file cannot be written; an older one stays.
    """
    try:
        with replacing(path) as temporary:
            torch.save({"format": _STATE_FORMAT, **state}, temporary)
    except (OSError, RuntimeError) as error:  # PyTorch's zip writer turns a full disk into a RuntimeError
        raise _cannot_write(path, error) from error


def load_state(path: str | Path) -> dict[str, Any]:
    """Read what `save_state` wrote, onto the CPU; nothing in the file is executed.

    Raises:
        CheckpointError: no such file, damaged, or not a training state of this library.
    """
    path = Path(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: not a training state, or damaged ({_first_line(error)})") from error
    if not isinstance(state, dict) or state.get("format") != _STATE_FORMAT:
        raise CheckpointError(f"{path}: not a training state of this version of doublehead")
    return state


def _find_model(path: Path) -> Path:
    if path.is_dir():
        if not (path / MODEL_FILE).is_file():
            raise CheckpointError(f"{path}: this folder has no {MODEL_FILE} (training writes it at each checkpoint)")
        return path / MODEL_FILE
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.name == STATE_FILE:
        raise CheckpointError(f"{path}: this is a training state for --resume; give the {MODEL_FILE} beside it")
    return path


def _read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if not metadata.get("format", "").startswith("doublehead.model/"):
                raise CheckpointError(f"{path}: a safetensors file, but not a model of doublehead")
            if metadata["format"] != _MODEL_FORMAT:
                raise CheckpointError(f"{path}: written in {metadata['format']}, this version reads {_MODEL_FORMAT}")
            return metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: not a safetensors file, or truncated ({_first_line(error)})") from error


def _load_weights(model: nn.Module, tensors: dict[str, torch.Tensor], path: Path) -> None:
    expected = model.state_dict()
    problems = [f"missing {name}" for name in expected if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in expected]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, the recipe's model {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{path}: its weights do not fit its recipe: {'; '.join(problems[:5])}{more}")
    model.load_state_dict(tensors)


def _without_download(recipe: Recipe) -> Recipe:
    """The recipe with its backbone left random: the file's own weights replace it."""
    backbone = replace(recipe.model.backbone, weights=None)
    return replace(recipe, model=replace(recipe.model, backbone=backbone))


def _cannot_write(path: str | Path, error: Exception) -> CheckpointError:
    reason = getattr(error, "strerror", None) or _first_line(error)
    return CheckpointError(f"{path}: cannot be written: {reason}; what was there before is untouched")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
