"""The committed records in evidence/records, and the numbers in them by seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from paired import Effect

from doublehead.analysis.heads.curves import of_heads

RECORDS = Path(__file__).resolve().parent / "records"
ORIGIN = ("what", "command", "commit", "date", "machine", "seeds", "seconds")
"""What every record says of itself."""
Record = dict[str, Any]
Seeds = dict[int, float]
"""Seed -> a number."""


def load(folder: Path = RECORDS) -> dict[str, Record]:
    """Name -> record."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def gaps(record: Record) -> list[str]:
    """What a record does not say of its origin."""
    missing = [name for name in ORIGIN if record.get(name) in (None, "", [], {})]
    machine = record.get("machine") or {}
    return missing + [
        f"machine: {name}" for name in ("processor", "cores", "threads", "torch") if not machine.get(name)
    ]


def of_runs(record: Record, kind: str, metric: str) -> Seeds:
    """A number of whole trainings; AP in percent."""
    return {run["seed"]: 100 * run[metric] for run in record["runs"] if run["kind"] == kind and run[metric] is not None}


def changed(record: Record, variant: str, kind: str, metric: str) -> Seeds:
    """A variant's number; the base's where the variant does not reach the kind."""
    return of_heads(record, kind, metric, variant) or of_heads(record, kind, metric)


def correlation(record: Record, head: str, minus: str, boxes: str, group: str = "all") -> Effect | None:
    """The difference of two heads' correlations in the record of `analyze pearson`, over seeds."""
    table = record["tables"].get("pearson-differences")
    if table is None:
        return None
    for row in table["rows"]:
        one = dict(zip(table["columns"], row, strict=True))
        for sign, names in ((1, (head, minus)), (-1, (minus, head))):
            if (one["head"], one["minus"], one["boxes"], one["group"]) == (*names, boxes, group):
                value, error = one["difference"], one["se seeds"]
                return None if value is None else Effect(sign * value, error, one["seeds"])
    return None
