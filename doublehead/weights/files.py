"""Reads a file of weights of any kind: torch.save, pickle or safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from . import arrays, names
from .pickles import NamesCode, Refused, Unpickler, WeightsError
from .torch_files import MAGIC, read_archive, read_old_file

PICKLE_NAMES: dict[tuple[str, str], Any] = {**names.NAMES, **arrays.NAMES}
OWN_FORMAT = "doublehead.model/"
"""The prefix of the format in the header of this library's own models."""
OWN_NAMES = "detector.backbone."
"""The prefix of tensor names in this library's own models."""


def read_file(path: str | Path) -> Any:
    """The contents of a file: dictionaries, lists and plain values, and placeholders for tensors and arrays, which
    `entries.take_state` reads.

    Raises:
        WeightsError: the file does not exist, is truncated or of another kind, or is a pickle that refers to code or
            has operations that no file of weights needs; the message says which.
    """
    path = Path(path)
    if path.is_dir():
        raise WeightsError(f"{path}: a folder; give the checkpoint's file")
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            head = file.read(64)
        return _reader(path, head)(path)
    except WeightsError:
        raise
    except NamesCode as error:
        raise WeightsError(
            f"{path}: names {error}, which is code and not weights; nothing of the file was executed. Save the weights "
            "alone where the file comes from: torch.save(model.state_dict(), ...)"
        ) from error
    except Refused as error:
        raise refusal(path, error) from error
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged file may raise almost anything
        raise WeightsError(f"{path}: truncated or damaged ({first_line(error)})") from error


def refusal(path: Path, error: Refused) -> WeightsError:
    """The error for a file with forbidden contents."""
    return WeightsError(f"{path}: {error}; damaged, or not a file of weights. Nothing of it was used")


def _reader(path: Path, head: bytes) -> Any:
    if head.startswith(b"PK"):
        return read_archive
    if MAGIC in head:
        return read_old_file
    if is_safetensors(path):
        return read_safetensors
    if head and (head[:1] == b"\x80" or head[:1] in b"(}]c"):
        return _read_pickle
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path}: a Git LFS pointer, not the file itself: fetch it with `git lfs pull`")
    if head.lstrip()[:1] == b"<":
        raise WeightsError(f"{path}: a web page, not a checkpoint: the download failed")
    what = "an empty file" if not head else "not a file of torch.save, pickle or safetensors"
    raise WeightsError(f"{path}: not a checkpoint ({what})")


def is_safetensors(path: str | Path) -> bool:
    """Whether a file begins like safetensors: with the length of the header, and the header as JSON."""
    if not Path(path).is_file():
        return False
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{" or Path(path).suffix == ".safetensors"


def is_own_model(path: str | Path) -> bool:
    """Whether a safetensors file is a model of this library, by its header or its tensors' names.

    Raises:
        WeightsError: it is damaged, or no safetensors file.
    """
    import safetensors  # imported here because models need only PyTorch and torchvision

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("format", "")
            return header.startswith(OWN_FORMAT) or any(name.startswith(OWN_NAMES) for name in file.keys())  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(f"{path}: not a safetensors file, or truncated ({first_line(error)})") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, unless it is a model of this library."""
    import safetensors

    if is_own_model(path):
        raise WeightsError(f"{path}: already a model of this library: evaluate and detect take it as it is")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(f"{path}: not a safetensors file, or truncated ({first_line(error)})") from error


def _read_pickle(path: Path) -> Any:
    with open(path, "rb") as file:
        return Unpickler(file, path.stat().st_size, PICKLE_NAMES).load()


def first_line(error: BaseException) -> str:
    """An error's first line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
