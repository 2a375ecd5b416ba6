"""The integers that stand for numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Grid(NamedTuple):
    """The numbers that a product's input can have: `step * (q - zero)` for the integers q of 0 .. top."""

    step: float
    zero: int
    """The integer that stands for 0."""
    top: int
    """The largest integer: 255, or 127 where products of larger ones saturate."""


def grid_of(scale: float, signed: bool, bits: int) -> Grid:
    """The grid of an input.

    Args:
        scale: the step of 8 bits.
        signed: whether the input can be negative; else 0 stands for 0.
        bits: 8, or 7: steps are twice as large, so that the grid reaches as far.
    """
    return Grid(scale * 2 ** (8 - bits), 2 ** (bits - 1) if signed else 0, 2**bits - 1)


def quantize(x: Tensor, grid: Grid) -> Tensor:
    """The nearest integers of the grid, ties to even: a float32 tensor -> uint8 of the same shape, contiguous."""
    made = torch.quantize_per_tensor(x.contiguous(), grid.step, grid.zero, torch.quint8)
    # Its memory, not `int_repr`, which copies.
    q = torch.empty(0, dtype=torch.uint8).set_(made.untyped_storage(), 0, x.shape)
    return q if grid.top == 255 else q.clamp_(max=grid.top)


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight `Tensor[O, ...]` as int8 of -127 .. 127 and one float32 scale for each of its output channels.

    A channel of zeros has the scale 1.
    """
    rows = weight.to(torch.float32).flatten(1)
    scales = rows.abs().amax(1) / 127
    scales = torch.where(scales > 0, scales, 1.0)
    return (rows / scales[:, None]).round().clamp(-127, 127).to(torch.int8).view(weight.shape), scales
