"""Digests that detect damaged checkpoints: of a model's tensors and description, and of a whole zip archive.

They detect accidents (a bad disk, a broken copy, a manual edit), not forgery: anyone can write a matching digest.
SHA-256 is used because processors have instructions for it.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

KEY = "digest"
_KIND_KEY, _KIND = "digest_of", "sha256: metadata and tensors"
"""A second entry; without it, a file whose digest entry became unreadable would pass for an old one without digest."""

_END = struct.Struct("<4s16sH")  # end of a zip archive: signature, other fields, length of the comment
_END_SIGNATURE = b"PK\x05\x06"
_MARK = b"doublehead.sha256"
_COMMENT = len(_MARK) + hashlib.sha256().digest_size
_BLOCK = 1 << 20


class Damaged(ValueError):
    """The content is damaged; the message says how it was detected."""


# ---------------------------------------------------------------------- a model: tensors and metadata


def with_digest(metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """`metadata` with a digest of itself and of `tensors` (on the CPU, contiguous)."""
    described = {**metadata, _KIND_KEY: _KIND}
    return described | {KEY: _digest(described, tensors)}


def matches(metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether the digest matches the metadata and tensors; True if there is none (old files)."""
    if KEY not in metadata and _KIND_KEY not in metadata:
        return True
    described = {name: text for name, text in metadata.items() if name != KEY}
    return metadata.get(KEY) == _digest(described, tensors)


def of_weights(tensors: Mapping[str, torch.Tensor]) -> str:
    """A digest of a model's `state_dict`, by which other files name the weights that they belong to.

    It does not depend on the file that holds them, nor on its description.
    """
    return _digest({}, {name: tensor.detach().cpu() for name, tensor in tensors.items()})


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str:
    names = sorted(tensors)
    kinds = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    digest = hashlib.sha256(json.dumps([sorted(metadata.items()), kinds]).encode())
    for name in names:
        digest.update(memoryview(tensors[name].contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


# ---------------------------------------------------------------------- a zip archive, as torch.save writes


def seal(path: Path) -> None:
    """Append a digest to a zip archive, as its comment, which other programs ignore."""
    with open(path, "rb+") as file:
        file.seek(-_END.size, 2)
        signature, rest, length = _END.unpack(file.read())
        if signature != _END_SIGNATURE or length:
            raise ValueError(f"{path}: not a zip archive without a comment")
        file.seek(-_END.size, 2)
        file.write(_END.pack(signature, rest, _COMMENT))
        size = file.tell()
        file.write(_MARK + _digest_of_file(file, size))


def check_sealed(path: Path) -> None:
    """Check an archive against its digest; for older archives without one, check the zip records' checksums.

    Raises:
        Damaged: the content is not what was written.
    """
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _COMMENT - _END.size))
        tail = file.read()
        has_digest = not (tail[-_END.size :].startswith(_END_SIGNATURE) and tail.endswith(b"\0\0"))  # no comment
        if has_digest:
            end, mark, digest = tail[: _END.size], tail[_END.size : -32], tail[-32:]
            if not end.startswith(_END_SIGNATURE) or mark != _MARK:
                raise Damaged("its end is not that of a zip archive")
            if digest != _digest_of_file(file, size - _COMMENT):
                raise Damaged("it does not match its digest")
    _check_records(path, size, checksums=not has_digest)


def _digest_of_file(file, size: int) -> bytes:
    digest = hashlib.sha256()
    file.seek(0)
    while size:
        block = file.read(min(size, _BLOCK))
        if not block:
            raise Damaged("it is shorter than it was")
        digest.update(block)
        size -= len(block)
    return digest.digest()


def _check_records(path: Path, size: int, checksums: bool) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            wrong = archive.testzip() if checksums else None
    except Exception as error:  # a damaged archive raises nearly everything
        raise Damaged(str(error)) from error
    if wrong is not None:
        raise Damaged(f"the checksum of its record {wrong} is another one")
    if sum(record.file_size for record in records) > size:  # torch.save compresses nothing
        raise Damaged("its records are larger than the file")
