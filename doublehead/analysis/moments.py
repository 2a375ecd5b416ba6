"""Mean, standard deviation and correlation of any number of pairs, in constant memory and without rounding.

Scores and IoUs lie in [0, 1].  They are rounded to multiples of 2^-24, the step of float32 just below 1, and summed as
integers, exactly: partial sums may be added in any order, on any number of processes, with the same result to the bit
as one pass over everything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

STEPS = 2**24
"""The number of steps in 1."""
_PART = 2**14
"""The number of pairs whose products, up to 2^48 each, are summed in int64 without overflow."""


class Moments(NamedTuple):
    """Sums over pairs (x, y), as Python integers, which do not overflow."""

    count: int = 0
    x: int = 0
    y: int = 0
    xx: int = 0
    yy: int = 0
    xy: int = 0

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of pairs together."""
        return Moments(*(a + b for a, b in zip(self, other, strict=True)))

    def without(self, part: Moments) -> Moments:
        """The moments of these pairs but those of `part`, which are among them."""
        return Moments(*(a - b for a, b in zip(self, part, strict=True)))

    @property
    def x_mean(self) -> float | None:
        """The mean; None without pairs."""
        return self.x / (self.count * STEPS) if self.count else None

    @property
    def y_mean(self) -> float | None:
        """The mean; None without pairs."""
        return self.y / (self.count * STEPS) if self.count else None

    @property
    def x_std(self) -> float | None:
        """The population standard deviation; None without pairs."""
        return math.sqrt(self._spread(self.x, self.xx)) / (self.count * STEPS) if self.count else None

    @property
    def y_std(self) -> float | None:
        """The population standard deviation; None without pairs."""
        return math.sqrt(self._spread(self.y, self.yy)) / (self.count * STEPS) if self.count else None

    @property
    def pearson(self) -> float | None:
        """Pearson's correlation, in [-1, 1].  None where x or y does not vary."""
        x, y = self._spread(self.x, self.xx), self._spread(self.y, self.yy)
        if x == 0 or y == 0:
            return None
        together = self.count * self.xy - self.x * self.y
        return max(-1.0, min(1.0, together / (math.sqrt(x) * math.sqrt(y))))

    @property
    def possible(self) -> bool:
        """Whether simple bounds allow these moments for pairs in [0, 1]."""
        n, most = self.count, self.count * STEPS
        sums = max(self.x, self.y) <= most and max(self.xx, self.yy, self.xy) <= most * STEPS
        spreads = min(n * self.xx - self.x**2, n * self.yy - self.y**2) >= 0
        return n > 0 and sums and spreads and self.xy**2 <= self.xx * self.yy

    def _spread(self, total: int, squares: int) -> int:
        """count^2 times the variance, exactly: it is computed from integers."""
        return self.count * squares - total * total


class MomentTable:
    """Moments of many cells; a cell is a tuple of small integers, such as (head, class, bin).

    Args:
        shape: the number of cells along each axis.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = tuple(shape)
        self.cells: dict[tuple[int, ...], Moments] = {}

    def add(self, cells: Sequence[int | Tensor], x: Tensor, y: Tensor) -> None:
        """Add K pairs.

        Args:
            cells: for each axis the cells of the pairs, `Tensor[K]` int64, or one number for all.
            x, y: `Tensor[K]`, floating point, in [0, 1].
        """
        if len(x) == 0:
            return
        numbers = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        for count, cell in zip(self.shape, cells, strict=True):
            numbers = numbers * count + cell
        found, sums = _sums(numbers, x, y)
        for number, values in zip(found, sums, strict=True):
            self._put(self._unravel(number), Moments(*values))

    def empty(self) -> MomentTable:
        """A table of the same shape without pairs."""
        return MomentTable(self.shape)

    def merge(self, other: MomentTable) -> None:
        """Add another table of the same shape."""
        if other.shape != self.shape:
            raise ValueError(f"tables of shapes {self.shape} and {other.shape} cannot be merged")
        for cell, moments in other.cells.items():
            self._put(cell, moments)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the cells with pairs, sorted."""
        return {
            "shape": list(self.shape),
            "cells": [[list(cell), list(self.cells[cell])] for cell in sorted(self.cells)],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MomentTable:
        """Rebuild a table from the result of `to_dict`.

        Raises:
            ValueError, TypeError, KeyError: the values are not such a result, or the moments are impossible.
        """
        table = cls([_whole(extent) for extent in values["shape"]])
        for cell, numbers in values["cells"]:
            moments, index = Moments(*map(_whole, numbers)), tuple(map(_whole, cell))
            inside = [p < extent for p, extent in zip(index, table.shape, strict=True)]
            if index in table.cells or not all(inside):
                raise ValueError(f"cell {list(index)} is there twice, or lies outside of the shape {list(table.shape)}")
            if len(numbers) != len(moments) or not moments.possible:
                raise ValueError(f"cell {list(index)} has sums that no pairs in [0, 1] have")
            table.cells[index] = moments
        return table

    def _put(self, cell: tuple[int, ...], moments: Moments) -> None:
        self.cells[cell] = self.cells.get(cell, Moments()).merge(moments)

    def _unravel(self, number: int) -> tuple[int, ...]:
        cell = []
        for count in reversed(self.shape):
            number, index = divmod(number, count)
            cell.append(index)
        return tuple(reversed(cell))


def _whole(value: Any) -> int:
    """`value` if it is a non-negative int; else ValueError."""
    if type(value) is not int or value < 0:
        raise ValueError(f"expected a whole number from 0 on, got {value!r:.40}")
    return value


def _sums(numbers: Tensor, x: Tensor, y: Tensor) -> tuple[list[int], list[list[int]]]:
    """The distinct `numbers`, and the six sums for each; computed on the tensors' device."""
    x, y = ((values.double() * STEPS).round().long() for values in (x, y))
    pairs = torch.stack((torch.ones_like(x), x, y, x * x, y * y, x * y))
    found, indices = numbers.unique(return_inverse=True)
    parts = [
        pairs.new_zeros(6, len(found)).index_add_(1, index, part)
        for index, part in zip(indices.split(_PART), pairs.split(_PART, dim=1), strict=True)
    ]
    columns = torch.stack(parts).permute(2, 1, 0).tolist()  # cell, sum, part
    return found.tolist(), [[sum(part) for part in column] for column in columns]
