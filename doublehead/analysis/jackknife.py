"""Standard errors of what is measured on boxes that are not independent: the delete-a-group jackknife over pictures.

The windows of one object share its look, and the objects of one picture share the picture.  So a standard error from
the number of windows would be far too small.  Here whole pictures are the clusters.  A data set's pictures are dealt
into G = `CLUSTERS` groups by their position (up to G pictures: each is a group of its own).  Each statistic, such as a
mean over windows or a correlation, is computed anew without each group g, which gives t_(g), and

    standard error = sqrt((G - 1) / G * sum over g of (t_(g) - mean of all t_(g))^2)

where only groups with boxes of the kind count (B. Efron and R. Tibshirani, An Introduction to the Bootstrap, 1993,
equation 11.5; for groups, P. Kott, The Delete-a-Group Jackknife, Journal of Official Statistics 17, 2001).  A
difference of two heads is a statistic of both: it is computed without the same pictures on both sides, so its standard
error is that of paired measurements.

All sums are exact (see `moments`); the result is the same to the bit for any number of processes.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from doublehead.analysis.moments import Moments, MomentTable

CLUSTERS = 100
"""The most groups of pictures: the relative standard deviation of the standard error itself is then about 7 %."""


class Sample(NamedTuple):
    """The pairs of one trained model in one cell of a figure."""

    whole: Moments
    without: list[Moments | None]
    """The moments without each group of pictures; None: it has no pairs."""


class Estimate(NamedTuple):
    """A number with its standard errors; None: it cannot be computed."""

    value: float | None = None
    """The mean over the seeds."""
    error: float | None = None
    """The standard error over pictures, for these trained models."""
    seed_error: float | None = None
    """The standard error over seeds, for these pictures: the sample standard deviation / sqrt(seeds)."""

    @property
    def shown(self) -> float | None:
        """The error to draw: over seeds where there are several, otherwise over pictures."""
        return self.error if self.seed_error is None else self.seed_error


class Samples:
    """The samples of a table whose last axis is the group of pictures."""

    def __init__(self, table: MomentTable) -> None:
        self._groups = table.shape[-1]
        self._cells: dict[tuple[int, ...], list[tuple[int, Moments]]] = defaultdict(list)
        for (*cell, group), moments in table.cells.items():
            self._cells[tuple(cell)].append((group, moments))

    def total(self, *where: int | Collection[int]) -> Sample:
        """All cells whose index along each axis but the last is the given number, or one of the given numbers."""
        choices = [[one] if isinstance(one, int) else one for one in where]
        parts = [Moments()] * self._groups
        for cell in itertools.product(*choices):
            for group, moments in self._cells.get(cell, ()):
                parts[group] = parts[group].merge(moments)
        return sample(parts)


def sample(parts: Sequence[Moments]) -> Sample:
    """From the moments of each group of pictures."""
    whole = Moments()
    for part in parts:
        whole = whole.merge(part)
    return Sample(whole, [whole.without(part) if part.count else None for part in parts])


def estimate(seeds: Sequence[Sequence[Sample]], statistic: Callable[..., float | None]) -> Estimate:
    """The mean of a statistic over seeds.

    Args:
        seeds: for each seed the samples that the statistic is of: one, or two for a difference of two heads.
        statistic: takes as many `Moments`; None where it is not defined.
    """
    values = [statistic(*(one.whole for one in samples)) for samples in seeds]
    if not values or None in values:
        return Estimate()
    every = [one for samples in seeds for one in samples]
    groups = [g for g in range(len(every[0].without)) if any(one.without[g] is not None for one in every)]
    left = [[statistic(*(_left(one, g) for one in samples)) for samples in seeds] for g in groups]
    seed_error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(fmean(values), _jackknife(left), seed_error)


def _left(one: Sample, group: int) -> Moments:
    left = one.without[group]
    return one.whole if left is None else left


def _jackknife(left: list[list[float | None]]) -> float | None:
    """From the statistic without each group, for each seed."""
    count = len(left)
    if count < 2 or any(None in values for values in left):
        return None
    means = [fmean(values) for values in left]
    middle = fmean(means)
    return math.sqrt((count - 1) / count * math.fsum((mean - middle) ** 2 for mean in means))
