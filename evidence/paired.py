"""Differences of trainings with the same seeds, and the rule by which a finding of the paper appears here or not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Literal, NamedTuple

Verdict = Literal["appears", "turned round", "does not appear", "undecided"]

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t for 95 %, both sides, with 1, 2, ... degrees of freedom."""


class Sample(NamedTuple):
    """A number over seeds."""

    mean: float
    std: float | None
    """The sample standard deviation (n - 1); None with one seed."""
    count: int


class Effect(NamedTuple):
    """A difference over seeds, paired."""

    mean: float
    error: float | None
    """The standard error of the mean; None with one seed."""
    count: int

    @property
    def size(self) -> float | None:
        """The mean in standard deviations of the paired differences; None: these do not vary, or there is one."""
        return self.mean / (self.error * math.sqrt(self.count)) if self.error else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 %, by Student's t; None with one seed."""
        if self.error is None:
            return None
        reach = student(self.count) * self.error
        return self.mean - reach, self.mean + reach


def student(count: int) -> float:
    """Student's t for 95 % and `count` values; beyond ten that of ten, which is on the safe side."""
    return STUDENT[min(count - 2, len(STUDENT) - 1)]


def sample(values: Sequence[float]) -> Sample:
    """Mean and standard deviation."""
    return Sample(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Effect | None:
    """Ours - theirs, by seed, over the seeds that both have; None: there is no such seed."""
    seeds = sorted(ours.keys() & theirs.keys())
    return effect([ours[seed] - theirs[seed] for seed in seeds]) if seeds else None


def effect(differences: Sequence[float]) -> Effect:
    """Mean and standard error of differences, one of each seed."""
    mean, std, count = sample(differences)
    return Effect(mean, None if std is None else std / math.sqrt(count), count)


def verdict(found: Effect, paper: float | None) -> Verdict:
    """What becomes of a finding of the paper.

    Args:
        found: the difference here, positive in the paper's direction.
        paper: the paper's own difference, in the same unit; None: it gives none.

    Returns:
        "appears": the 95 % interval lies above 0; "turned round": it lies below; "does not appear": 0 is in it, and a
        difference as large as the paper's is not; "undecided": all else, and one seed.
    """
    if found.interval is None:
        return "undecided"
    low, high = found.interval
    if low > 0:
        return "appears"
    if high < 0:
        return "turned round"
    return "does not appear" if paper is not None and high < paper else "undecided"
