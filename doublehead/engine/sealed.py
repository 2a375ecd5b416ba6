"""Small JSON files beside a model's weights, such as its calibrated gate: with a checksum, and bound to the weights.

Like the weights' own digest, the checksum reveals accidents and edits by hand, not forgery.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from doublehead.engine.checkpoint import MODEL_FILE
from doublehead.engine.files import write_json
from doublehead.errors import CheckpointError

CHECKSUM = "checksum"
_LARGEST = 1 << 24  # bytes


def path_beside(checkpoint: str | Path, name: str) -> Path:
    """Where such a file of a checkpoint, or of a run's folder, lies: RUN/name; beside RUN/best.safetensors
    RUN/best.name, because it is of other weights than RUN/model.safetensors."""
    path = Path(checkpoint)
    if path.is_dir() or path.name == MODEL_FILE:
        return (path if path.is_dir() else path.parent) / name
    return path.with_name(f"{path.stem}.{name}")


def write_sealed(path: str | Path, kind: str, content: Mapping[str, Any]) -> None:
    """Write `content` (plain values) to `path` as JSON, atomically, with its format's name and a checksum over both.

    Raises:
        OSError: it cannot be written; an older file stays.
    """
    described = {"format": kind, **content}
    write_json(path, described | {CHECKSUM: _checksum(described)})


def read_sealed(path: str | Path, kind: str, again: str) -> dict[str, Any]:
    """What `write_sealed` wrote, without the checksum.

    Args:
        kind: the format's name, such as "doublehead.gate/1".
        again: the command that makes the file, for the messages; with --overwrite it replaces one.

    Raises:
        CheckpointError: the file is missing, of another kind or version, damaged or edited; one line that says which.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file; make it: {again}")
    again += " --overwrite"
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST:
            raise ValueError("not a small file")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not isinstance(content.get("format"), str):
            raise ValueError("it names no format")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # of characters, of JSON
        reason = f"not a file of doublehead, or damaged ({' '.join(str(error).split())[:200]})"
        raise CheckpointError(f"{path}: {reason}; make it again: {again}") from error
    if content["format"] != kind:
        shown = " ".join(content["format"].split())[:100]
        raise CheckpointError(f"{path}: its format is {shown!r}, this version reads {kind!r}; make it again: {again}")
    checksum = content.pop(CHECKSUM, None)
    if checksum != _checksum(content):
        raise CheckpointError(
            f"{path}: edited or damaged since it was written: its checksum does not fit its content; make it again: "
            + again
        )
    return content


def _checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 of the content as JSON, whatever the order of its entries and the file's white space."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
