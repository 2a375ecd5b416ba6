"""Finds the runs in a folder, and compares recipes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from doublehead.config import Recipe, to_dict
from doublehead.engine.files import RECIPE_FILE
from doublehead.errors import UserError

WITHOUT_EFFECT = (
    "data.root", "data.workers", "data.on_bad_record", "data.max_skipped", "data.outside_root",
    "train.device", "train.log_every", "train.checkpoint_every", "train.eval_every",
)  # fmt: skip
"""Fields that say where and how a run is carried out, without an effect on what it learns."""


class Difference(NamedTuple):
    """One field in which two recipes differ."""

    field: str
    found: Any
    wanted: Any

    def __str__(self) -> str:
        return f"{self.field} {self.found} instead of {self.wanted}"


def run_folders(root: str | Path) -> list[Path]:
    """Every folder in `root`, at any depth, that holds a run, finished or not; sorted by path.

    Raises:
        UserError: no such folder.
    """
    if not Path(root).is_dir():
        raise UserError(f"--runs {root}: no such folder")
    return [path.parent for path in sorted(Path(root).rglob(RECIPE_FILE))]


def differences(found: Recipe, wanted: Recipe, leave_out: tuple[str, ...] = ()) -> list[Difference]:
    """The fields of model, data and training in which `found` differs from `wanted`, except `WITHOUT_EFFECT`.

    Args:
        leave_out: further fields to ignore, or prefixes of them (`model.detection.`).
    """
    before, after = dict(_flat(to_dict(found))), dict(_flat(to_dict(wanted)))
    names = [name for name in after if name.startswith(("model.", "data.", "train."))]
    names = [name for name in names if not name.startswith((*WITHOUT_EFFECT, *leave_out))]
    return [
        Difference(name, before.get(name), after[name])
        for name in names
        if json.dumps(before.get(name)) != json.dumps(after[name])  # a list read from a file is a tuple here
    ]


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
