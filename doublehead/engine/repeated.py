"""Pictures that occur more than once in a data set: an evaluation on pictures that were trained on says nothing."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from doublehead.data.layouts.splits import COPY

_END = 4096
"""Bytes at each end of a file that are compared before the whole."""


@dataclass(frozen=True)
class Repeated:
    """Pictures that occur more than once, by the first two places of each."""

    across: list[tuple[str, str]] = field(default_factory=list)
    """Of equal content, in train and in val: (name in train, name in val)."""
    within: list[tuple[str, str, str]] = field(default_factory=list)
    """Of equal content, within a split: (split, name, other name)."""
    named: list[tuple[str, str]] = field(default_factory=list)
    """Of equal name, in train and in val, with other content; Roboflow's copies of one picture count as equal."""


def find_repeated(paths: Mapping[str, Sequence[str]]) -> Repeated:
    """Pictures of equal content: an evaluation on pictures that were trained on says nothing.

    Args:
        paths: the files of each split.
    """
    places: dict[tuple[int, bytes], list[tuple[str, str]]] = {}
    for split, files in paths.items():
        for file in files:
            places.setdefault(_ends(file), []).append((split, file))
    alike: dict[bytes, list[tuple[str, str]]] = {}
    for candidates in places.values():
        if len(candidates) > 1:
            for split, file in candidates:
                alike.setdefault(hashlib.blake2b(Path(file).read_bytes()).digest(), []).append((split, file))
    found = Repeated()
    for same in alike.values():
        if len(same) < 2:
            continue
        by_split = {split: [file for where, file in same if where == split] for split, _ in same}
        if len(by_split) > 1:
            found.across.append((by_split["train"][0], by_split["val"][0]))
        found.within.extend((split, *files[:2]) for split, files in by_split.items() if len(files) > 1)
    found.named.extend(_named_alike(paths, found.across))
    return found


def _named_alike(paths: Mapping[str, Sequence[str]], leave_out: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The first file of each name in train and in val, but for those in `leave_out`."""
    known = {file for pair in leave_out for file in pair}
    by_name: dict[str, dict[str, str]] = {}
    for split, files in paths.items():
        named = by_name.setdefault(split, {})
        for file in files:
            if file not in known:
                named.setdefault(COPY.sub("", os.path.basename(file)), file)
    train, val = by_name.get("train", {}), by_name.get("val", {})
    return [(file, val[name]) for name, file in train.items() if name in val]


def _ends(path: str) -> tuple[int, bytes]:
    """Size and both ends of a file; few files that differ have these in common."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(_END)
        file.seek(max(0, size - _END))
        return size, hashlib.blake2b(head + file.read(_END), digest_size=16).digest()
