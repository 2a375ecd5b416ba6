"""What a measurement has come to, in files: written whole, and believed only after every part was checked.

A file of another version, another measurement or another folder, a damaged or a crafted one is refused in one line; so
no number of a figure comes from it.  Files are plain JSON: reading one executes nothing.
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

FORMAT = "doublehead.analysis/2"
"""Changes with the meaning of what is stored: 2, boxes of legacy models lie where training has them."""
MOST_BYTES = 2**29
"""The largest of COCO's val2017 is some ten MiB."""
_MERGED = "merged.json"
_CONTENT = ("fingerprint", "done", "table")


class Summary(Protocol):
    """What a measurement leaves of any number of images; merging must be exact, in whatever order."""

    def empty(self) -> Summary:
        """One of the same kind that holds nothing."""

    def merge(self, other: Any) -> None:
        """Take in another one."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Summary:
        """Rebuild what `to_dict` gave."""


@dataclass
class State:
    """What has been measured so far."""

    fingerprint: dict[str, Any]
    """What the result depends on; states of different ones have nothing to do with each other."""
    table: Summary
    done: set[int] = field(default_factory=set)
    """Image ids."""

    def add(self, images: Iterable[int], table: Summary) -> None:
        """Take in images that are not done yet."""
        self.table.merge(table)
        self.done.update(images)

    def write(self, path: Path) -> None:
        """Write it as JSON, atomically."""
        content = {"fingerprint": self.fingerprint, "done": sorted(self.done), "table": self.table.to_dict()}
        write_json(path, {"format": FORMAT, "digest": _digest(content), **content}, indent=None)


def merge_states(folder: Path, empty: State, image_ids: Sequence[int]) -> State:
    """All states in `folder` as one, which then is the only file there.

    Args:
        folder: made if need be.
        empty: the fingerprint and an empty summary.
        image_ids: of the data set.

    Raises:
        UserError: a file cannot be believed, or is of something else; none is removed then.
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
        raise _damaged(file, "its list of images holds something else than ids")
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
        raise _damaged(file, "it is no JSON, or nested too deeply") from error
    if not isinstance(content, dict):
        raise _damaged(file, "it is no JSON object")
    if content.get("format") != FORMAT:
        raise UserError(
            f"{file}: written by another version of doublehead, this one reads {FORMAT!r}: remove {file.parent}, or "
            f"give another --out"
        )
    if not all(name in content for name in _CONTENT) or not isinstance(content["fingerprint"], dict):
        raise _damaged(file, f"it lacks one of {', '.join(_CONTENT)}")
    if content.get("digest") != _digest({name: content[name] for name in _CONTENT}):
        raise _damaged(file, "its content does not have the digest that was written with it")
    return content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _damaged(file: Path, why: str) -> UserError:
    why = " ".join(why.split())[:200]
    return UserError(f"{file}: damaged: {why}: remove {file.parent}, or give another --out")
