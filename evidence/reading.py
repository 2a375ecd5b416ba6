"""The committed records in evidence/records, and the numbers in them by seed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from paired import Effect, paired

RECORDS = Path(__file__).resolve().parent / "records"
ORIGIN = ("what", "command", "commit", "date", "machine", "seeds", "seconds")
"""What every record says of itself."""
BASE = "base"
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


def steps(record: Record) -> list[int]:
    """At which heads alone were evaluated."""
    return sorted({one["step"] for one in record["results"]})


def of_heads(
    record: Record, kind: str, metric: str, variant: str = BASE, step: int | None = None,
    readout: str | None = None, fusion: str | None = None,
) -> Seeds:  # fmt: skip
    """AP (or another number) of heads alone, in percent; without read-out and fusion the kind's own."""
    step = record["steps"] if step is None else step
    found: Seeds = {}
    for one in record["results"]:
        fits = (one["variant"], one["kind"], one["step"]) == (variant, kind, step) and one[metric] is not None
        if fits and readout in (None, one["readout"]) and fusion in (None, one["fusion"]):
            found.setdefault(one["seed"], 100 * one[metric])
    return found


def rois(record: Record, step: int) -> int:
    """Seen by the base's heads up to a step; the mean over seeds."""
    return round(fmean(one["rois"] for one in record["results"] if (one["variant"], one["step"]) == (BASE, step)))


def over_windows(
    record: Record, head: str, name: str, low: float, high: float, variant: str = BASE, step: int | None = None
) -> Seeds:
    """The mean of a head's `regressed_iou` or `score` over the bins of the windows' IoU from `low` to `high`.

    Every bin that has windows counts the same.
    """
    step = record["steps"] if step is None else step
    found: Seeds = {}
    for one in record["heads"]:
        if (one["variant"], one["head"], one["step"]) == (variant, head, step):
            number = len(one[name])
            bins = one[name][round(low * number) : round(high * number)]
            values = [value for value in bins if value is not None]
            if values:
                found.setdefault(one["seed"], fmean(values))
    return found


def changed(record: Record, variant: str, kind: str, metric: str) -> Seeds:
    """A variant's number; the base's where the variant does not reach the kind."""
    return of_heads(record, kind, metric, variant) or of_heads(record, kind, metric)


def crossing(record: Record, ours: Callable[[int], Mapping[int, float]], theirs: Callable[[int], Mapping[int, float]]):
    """The RoIs after which the mean of ours - theirs changes its sign for the last time, or None.

    Args:
        ours, theirs: step -> number by seed.  Between two steps the logarithm of the RoIs is interpolated.
    """
    points = [(rois(record, step), paired(ours(step), theirs(step))) for step in steps(record)]
    known = [(seen, found.mean) for seen, found in points if found is not None]
    found = None
    for (before, first), (after, second) in pairwise(known):
        if first * second < 0:
            share = first / (first - second)
            found = round(math.exp(math.log(before) + share * (math.log(after) - math.log(before))))
    return found


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
