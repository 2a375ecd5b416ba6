"""Checkpoints of a run: `model.safetensors` to use, `state.pt` to continue from.

`model.safetensors` holds the weights (the averaged ones where averaging is on) and, in its
header, all that is needed to rebuild the detector: the recipe, the classes, the category ids.
`state.pt` holds everything a resumed training needs; it contains tensors and plain values only.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import nn

from doublehead.config import Recipe, check, from_dict, to_dict
from doublehead.engine import state as state_schema
from doublehead.engine.file_kinds import other_kind
from doublehead.engine.files import check_room, replacing
from doublehead.engine.schema import Mismatch, is_finite, items, text, whole
from doublehead.errors import CheckpointError
from doublehead.version import __version__
from doublehead.weights import digest, read_plain
from doublehead.weights.wrappers import COUNTERS, without_wrappers

MODEL_FILE = "model.safetensors"
STATE_FILE = "state.pt"
_MODEL_FORMAT = "doublehead.model/1"


class LoadedModel(NamedTuple):
    """A detector read from a file, and the meaning of its labels."""

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
    more: Mapping[str, str] | None = None,
) -> None:
    """Write `model`'s weights and their description to `path`, atomically, with a digest that reveals damage.

    Args:
        model: what `build_detector` gave; it, or parts of it, may be compiled, or wrapped for averaging or
            for several devices.
        more: further entries of the file's header.

    Raises:
        CheckpointError: the recipe or the classes are none that `load_model` accepts, or the file cannot be written
            (disk full, no permission); an older one stays.
    """
    try:
        tensors = _unwrapped({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()})
        _check_labels(list(classes), [int(i) for i in category_ids])
        check(recipe)  # `load_model` does too
    except ValueError as error:
        raise CheckpointError(f"{path}: not written: {error}") from error
    metadata = dict(more or {}) | {
        "format": _MODEL_FORMAT,
        "version": __version__,
        "step": str(step),
        "recipe": json.dumps(to_dict(recipe)),
        "classes": json.dumps(list(classes)),
        "category_ids": json.dumps([int(i) for i in category_ids]),
    }
    try:
        with replacing(path) as temporary:
            # Not `save_file`: it has a temporary file of its own, which a killed process would leave behind.
            temporary.write_bytes(safetensors.torch.save(tensors, digest.with_digest(metadata, tensors)))
    except OSError as error:
        raise _cannot_write(path, error) from error


def load_model(path: str | Path, finite: bool = True) -> LoadedModel:
    """Rebuild the detector that `save_model` wrote.

    Weights are converted from the file's floating-point type to that of the model (float32), if that changes no
    value.

    Args:
        path: a `model.safetensors`, or the folder of a run that holds one.
        finite: refuse weights with NaN or infinity; False: load them, to examine a training that failed.

    Raises:
        CheckpointError: no such file, not a file of this library, damaged, or weights that are not finite or do not fit
            the recipe inside it.
    """
    path = find_model(Path(path))
    metadata, tensors = _read_safetensors(path)
    try:
        recipe, classes, category_ids = _description(metadata)
        model = _build(recipe, len(classes) + 1, _unwrapped(tensors))
        whole = digest.matches(metadata, tensors)  # last, as it takes the longest
        model.load_state_dict(_unwrapped(tensors))
        if finite:
            _check_finite(model.state_dict(), whole)
    except ValueError as error:
        raise CheckpointError(f"{path}: {_line(error)}") from error
    if not whole:
        raise CheckpointError(
            f"{path}: changed or damaged since it was written: its digest does not fit its content. Get the file again "
            "from its source; to change one on purpose, write it with doublehead.engine.save_model"
        )
    return LoadedModel(model.eval(), recipe, classes, category_ids)


def save_state(path: str | Path, state: dict[str, Any]) -> None:
    """Write a training state (tensors and plain values) to `path`, atomically, with a digest.

    Raises:
        CheckpointError: the file cannot be written; an older one stays.
    """
    try:
        with replacing(path) as temporary:
            try:
                torch.save({"format": state_schema.FORMAT, **state}, temporary)
            except RuntimeError:
                check_room(temporary)
                raise
            digest.seal(temporary)
    except (OSError, RuntimeError) as error:
        raise _cannot_write(path, error) from error


def load_state(path: str | Path) -> dict[str, Any]:
    """Read what `save_state` wrote, onto the CPU; nothing in the file is executed.

    Raises:
        CheckpointError: no such file, damaged, or not a training state of this library, with all its entries.
    """
    path = Path(path)
    try:
        digest.check_sealed(path)
        state = read_plain(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # Damaged, WeightsError, or no memory for it
        reason = _first_line(error).removeprefix(f"{path}: ")
        raise CheckpointError(f"{path}: not a training state, or damaged ({reason})") from error
    if not isinstance(state, dict) or state.get("format") != state_schema.FORMAT:
        raise CheckpointError(f"{path}: not a training state of this version of doublehead")
    try:
        state_schema.STATE(state, "")
    except Mismatch as error:
        raise CheckpointError(f"{path}: not a whole training state: {_line(error)}") from error
    return state


def find_model(path: Path) -> Path:
    """The file of weights that a checkpoint's path stands for: itself, or that in a run's folder.

    Raises:
        CheckpointError: there is none.
    """
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
                raise CheckpointError(
                    f"{path}: a safetensors file, but not a model of doublehead; if it is another project's detector, "
                    f"first make a model of it: doublehead convert {path} FOLDER"
                )
            if metadata["format"] != _MODEL_FORMAT:
                raise CheckpointError(
                    f"{path}: written in {_line(metadata['format'])}, this version reads {_MODEL_FORMAT}"
                )
            return metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except CheckpointError:
        raise
    except Exception as error:  # besides its own: MemoryError, a dtype that PyTorch lacks
        what = other_kind(path) or f"not a safetensors file, or truncated ({_first_line(error)})"
        raise CheckpointError(f"{path}: {what}") from error


def _description(metadata: dict[str, str]) -> tuple[Recipe, list[str], list[int]]:
    """The recipe, the classes and the category ids.

    Raises:
        ValueError: one of them cannot be used.
    """
    try:
        recipe = from_dict(_json(metadata, "recipe"))
        classes, category_ids = _json(metadata, "classes"), _json(metadata, "category_ids")
        _check_labels(classes, category_ids)
    except ValueError as error:
        version = metadata.get("version", "unknown")
        raise ValueError(f"its description cannot be used ({error}); written by doublehead {version}") from error
    return recipe, classes, category_ids


def _json(metadata: dict[str, str], name: str) -> Any:
    if name not in metadata:
        raise ValueError(f"it has no {name}")
    try:
        return json.loads(metadata[name])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its {name} is not JSON: {error}") from error


def _check_labels(classes: Any, category_ids: Any) -> None:
    items(text)(classes, "classes")
    if not classes:
        raise ValueError("classes: expected at least one, got none")
    items(whole(), len(classes))(category_ids, "category_ids")
    for name, values in (("classes", classes), ("category_ids", category_ids)):
        if twice := [value for value, count in Counter(values).items() if count > 1]:
            raise ValueError(f"{name}: {twice[0]!r} is there twice")


def _build(recipe: Recipe, num_classes: int, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """The model of a file's recipe, if `tensors` fit it.

    Built without memory first: a recipe may ask for any amount of it, while the tensors are read already.

    Raises:
        ValueError: the recipe describes no model, or another one.
    """
    from doublehead.models import build_detector  # only here: it brings torchvision

    config = _without_download(recipe).model
    try:
        if config.head.conv_blocks > len(tensors):  # each has some
            raise ValueError(f"model.head.conv_blocks is {config.head.conv_blocks}, with {len(tensors)} tensors")
        with torch.device("meta"):
            expected = build_detector(config, num_classes).state_dict()
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"its recipe makes no model ({_first_line(error)})") from error
    _check_fit(expected, tensors)
    return build_detector(config, num_classes)


def _check_fit(expected: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    problems = [f"missing {name}" for name in expected if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in expected]
    both = [(name, tensors[name], tensor) for name, tensor in expected.items() if name in tensors]
    problems += [
        f"{name} has shape {tuple(mine.shape)}, the recipe's model {tuple(wanted.shape)}"
        for name, mine, wanted in both
        if mine.shape != wanted.shape
    ]
    problems += [
        f"{name} is of {_name(mine.dtype)}, which does not become the recipe's {_name(wanted.dtype)} unchanged"
        for name, mine, wanted in both
        if not problems and not _converts(mine, wanted.dtype)
    ]
    if problems:
        raise ValueError(f"its weights do not fit its recipe: {_listed(problems, '; ')}")


def _converts(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether `tensor` has that dtype, or a floating-point one from which it converts exactly."""
    if tensor.dtype == dtype:
        return True
    if not (tensor.is_floating_point() and dtype.is_floating_point):
        return False
    if tensor.dtype.itemsize < dtype.itemsize:
        return True
    return torch.equal(tensor.to(dtype).to(tensor.dtype).nan_to_num(), tensor.nan_to_num())


def _check_finite(tensors: dict[str, torch.Tensor], whole: bool) -> None:
    wrong = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if wrong:
        cause = "take a checkpoint from before its training went wrong"
        raise ValueError(
            f"NaN or infinite numbers in {len(wrong)} of its {len(tensors)} tensors ({_listed(wrong, ', ')}); "
            + (cause if whole else "the file was changed or damaged since it was written")
        )


def _unwrapped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under the detector's own names."""
    plain = {without_wrappers(name): name for name in tensors}
    if len(plain) < len(tensors):
        raise ValueError("some tensors are there twice: under their own names and under those of a module's wrapper")
    return {name: tensors[source] for name, source in plain.items() if name not in COUNTERS}


def _without_download(recipe: Recipe) -> Recipe:
    """The recipe with a random backbone: the file's own weights replace it."""
    backbone = replace(recipe.model.backbone, weights=None)
    return replace(recipe, model=replace(recipe.model, backbone=backbone))


def _cannot_write(path: str | Path, error: Exception) -> CheckpointError:
    reason = getattr(error, "strerror", None) or _first_line(error)
    return CheckpointError(f"{path}: cannot be written: {reason}; what was there before is untouched")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _line(message: object) -> str:
    """A message that quotes a file, as one line of bounded length."""
    line = " ".join(str(message).split())
    return line if len(line) <= 700 else f"{line[:697]}..."


def _listed(parts: list[str], between: str) -> str:
    more = f"{between.rstrip()} and {len(parts) - 5} more" if len(parts) > 5 else ""
    return between.join(parts[:5]) + more


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
