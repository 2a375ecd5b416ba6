"""Reads files of torch.save: a zip archive, or, before PyTorch 1.6, pickles followed by the tensors' bytes."""

from __future__ import annotations

import struct
import sys
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import arrays, names, tensors
from .pickles import Refused, Unpickler, unpickle
from .tensors import Storage, StorageKind

MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
"""The magic number at the start of an old file, in its pickled form."""
_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
NAMES: dict[tuple[str, str], Any] = {**names.NAMES, **arrays.NAMES, **tensors.NAMES}
_LOCAL_HEADER = 30
"""The length of a record's local header, without its name."""


def read_archive(path: Path) -> Any:
    """The contents of a file of torch.save, with tensors as `LazyTensor`.

    Raises:
        Refused: it is another kind of archive, or has operations that no file of weights needs.
        Exception: a damaged file may raise almost any.
    """
    length = path.stat().st_size
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        records = {info.filename: info for info in archive.infolist()}
        pickled = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
        root = pickled[0].removesuffix("data.pkl") if len(pickled) == 1 else None
        if root is not None and f"{root}constants.pkl" in records:
            raise Refused("is a TorchScript program, not weights")
        if root is None:
            raise Refused("is a zip archive, but not one of torch.save")
        at = {name: _begin(file, info, length) for name, info in records.items() if name.startswith(root)}

        def content(name: str) -> bytes:
            file.seek(at[name])
            return file.read(records[name].file_size)

        order = content(f"{root}byteorder") if f"{root}byteorder" in records else b"little"
        swapped = order != sys.byteorder.encode()
        storages: dict[str, Storage] = {}

        def storage(pid: Any) -> Storage:
            kind, key, number = _parts(pid)
            record = f"{root}data/{key}"
            if key not in storages:
                if record not in records:
                    raise Refused(f"has no record {record[:80]!r}")
                info = records[record]
                storages[key] = Storage(path, kind, number, at[record], swapped, info.CRC)
                if kind.dtype is not None and storages[key].size != info.file_size:
                    raise Refused(f"has {info.file_size} bytes where {number} numbers of a {kind.name} should be")
            return _typed(storages[key], kind, number)

        program = content(pickled[0])
        if zlib.crc32(program) != (records[pickled[0]].CRC or zlib.crc32(program)):  # 0: written without a CRC
            raise Refused("has other names or shapes than were written (CRC): a damaged copy")
        return unpickle(program, NAMES, storage)


def _begin(file: Any, info: zipfile.ZipInfo, length: int) -> int:
    """The offset of a record's data in the file.

    Raises:
        Refused: the record is compressed, or lies outside the file.
    """
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise Refused("is a compressed archive, which torch.save never writes: unpack it, or save it again")
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER)
    if header[:4] != b"PK\x03\x04":
        raise Refused("is damaged: a record's header is missing")
    begin = info.header_offset + _LOCAL_HEADER + sum(struct.unpack("<HH", header[26:]))
    if begin + info.file_size > length:
        raise Refused("ends within a record")
    return begin


def read_old_file(path: Path) -> Any:
    """Like `read_archive`, for files of PyTorch before 1.6 (or of `_use_new_zipfile_serialization=False`)."""
    length = path.stat().st_size
    storages: dict[str, Storage] = {}

    def storage(pid: Any) -> Storage:
        kind, key, number = _parts(pid)
        storages.setdefault(key, Storage(path, kind, number))
        return _typed(storages[key], kind, number)

    with open(path, "rb") as file:
        if [Unpickler(file, length, {}).load() for _ in range(2)] != [_MAGIC, _VERSION]:
            raise Refused("is of another version of torch.save")
        system = Unpickler(file, length, {}).load()
        little = system.get("little_endian", True) if isinstance(system, Mapping) else True
        content = Unpickler(file, length, NAMES, storage).load()
        keys = Unpickler(file, length, {}).load()
        if type(keys) is not list or any(type(key) is not str for key in keys):  # nested keys may hash forever
            raise Refused("has no list of its tensors")
        for key in keys:
            found = storages[key]
            if found.kind.dtype is None:
                raise Refused(f"has tensors in a {found.kind.name}, where dense tensors of real numbers are accepted")
            found.swapped = bool(little) != (sys.byteorder == "little")
            (number,) = struct.unpack("<q" if little else ">q", file.read(8))
            if number != found.number:
                raise Refused(f"has {number} numbers where {found.number} should be")
            found.begin = file.tell()
            if found.begin + found.size > length:
                raise Refused("ends within a tensor")
            file.seek(found.size, 1)
    return content


def _parts(pid: Any) -> tuple[StorageKind, str, int]:
    """Take apart ("storage", kind, key, device, number of elements) and, in old files, a view of another storage."""
    if type(pid) is not tuple or not 5 <= len(pid) <= 6 or pid[0] not in ("storage", b"storage") or any(pid[5:]):
        raise Refused("refers to something other than its own storages")
    kind, key, _, number = pid[1:5]
    if type(kind) is not StorageKind or type(key) is not str or type(number) is not int or not 0 <= number < 2**62:
        raise Refused("refers to a storage in an unknown way")
    return kind, key, number


def _typed(storage: Storage, kind: StorageKind, number: int) -> Storage:
    """The storage, if all references agree on its type and length.

    Raises:
        Refused: they do not.
    """
    if storage.kind is not kind or storage.number != number:
        raise Refused("calls a storage by two types or lengths")
    return storage
