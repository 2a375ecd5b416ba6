"""Saves the state of a measurement in files, atomically, and validates it when it is read back.

A file from another version, measurement or folder, and a damaged or forged one, is refused with a one-line error, so it
cannot contribute to a figure.  Files are plain JSON: reading one executes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from doublehead.engine.files import write_json
from doublehead.errors import UserError

FORMAT = "doublehead.analysis/3"
"""Version of the stored values; since 3, moments are kept by cluster of pictures (see `jackknife`)."""
MOST_BYTES = 2**29
"""Limit on a file's size; the largest for COCO's val2017 has some tens of MiB."""
_MERGED = "merged.json"
_CONTENT = ("fingerprint", "done", "table")


class Summary(Protocol):
    """The result of a measurement on any number of images; merging must be exact, in any order."""

    def empty(self) -> Summary:
        """An empty summary of the same kind."""

    def merge(self, other: Any) -> None:
        """Add another summary."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Summary:
        """Rebuild a summary from the result of `to_dict`."""


@dataclass
class State:
    """The images measured so far, and their summary."""

    fingerprint: dict[str, Any]
    """Everything the result depends on; states with different fingerprints cannot be merged."""
    table: Summary
    done: set[int] = field(default_factory=set)
    """Ids of the measured images."""

    def add(self, images: Iterable[int], table: Summary) -> None:
        """Add images that are not done yet."""
        self.table.merge(table)
        self.done.update(images)

    def write(self, path: Path) -> None:
        """Write the state as JSON, atomically."""
        content = {"fingerprint": self.fingerprint, "done": sorted(self.done), "table": self.table.to_dict()}
        write_json(path, {"format": FORMAT, "digest": content_digest(content), **content}, indent=None)


def merge_states(folder: Path, empty: State, image_ids: Sequence[int]) -> State:
    """Merge all states in `folder` into one, which becomes the only file there.

    Args:
        folder: created if it does not exist.
        empty: the fingerprint and an empty summary.
        image_ids: the data set's image ids.

    Raises:
        UserError: a file is invalid or belongs to another measurement; no file is removed then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    merged = State(empty.fingerprint, empty.table.empty())
    files = sorted(folder.glob("rank-*.json"))
    if (folder / _MERGED).exists():
        files.insert(0, folder / _MERGED)
    for file in files:
        state = _read_state(file, empty, image_ids)
        if state.done <= merged.done:
            continue  # it was merged before, and the process stopped before it was removed
        if state.done & merged.done:
            raise UserError(f"{file}: holds images that another file holds too: remove {folder}, or give another --out")
        try:
            merged.add(state.done, state.table)
        except (ValueError, RuntimeError) as error:  # of another shape
            raise _damaged(file, str(error)) from error
    if files:
        merged.write(folder / _MERGED)
    for file in files:
        if file.name != _MERGED:
            file.unlink()
    return merged


def _read_state(file: Path, empty: State, image_ids: Sequence[int]) -> State:
    content = _read_content(file)
    before, now = content["fingerprint"], json.loads(json.dumps(empty.fingerprint))
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        names = " and ".join(changed)
        raise UserError(f"{file.parent}: holds the results of other {names}: give another --out, or remove it")
    done = content["done"]
    if not isinstance(done, list) or not all(type(number) is int for number in done):
        raise _damaged(file, "its list of images holds something other than ids")
    if len(set(done)) != len(done) or not set(done) <= set(image_ids):
        raise _damaged(file, "it names an image twice, or one that the data do not have")
    try:
        table = type(empty.table).from_dict(content["table"])
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RuntimeError) as error:
        raise _damaged(file, f"its table: {error}") from error
    return State(empty.fingerprint, table, set(done))


def _read_content(file: Path) -> dict[str, Any]:
    if (size := file.stat().st_size) > MOST_BYTES:
        raise _damaged(file, f"it has {size:,} bytes, at most {MOST_BYTES:,} are accepted")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(file, "it is not JSON, or nested too deeply") from error
    if not isinstance(content, dict):
        raise _damaged(file, "it is not a JSON object")
    if content.get("format") != FORMAT:
        raise UserError(
            f"{file}: written by another version of doublehead, this one reads {FORMAT!r}: remove {file.parent}, or "
            f"give another --out"
        )
    if not all(name in content for name in _CONTENT) or not isinstance(content["fingerprint"], dict):
        raise _damaged(file, f"it lacks one of {', '.join(_CONTENT)}")
    if content.get("digest") != content_digest({name: content[name] for name in _CONTENT}):
        raise _damaged(file, "its content does not match its digest")
    return content


def content_digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _damaged(file: Path, why: str) -> UserError:
    why = " ".join(why.split())[:200]
    return UserError(f"{file}: damaged: {why}: remove {file.parent}, or give another --out")
