"""Products of 8-bit integers in plain PyTorch: the definition, by sums of integers held in float64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from .grid import Grid


def quantize(x: Tensor, grid: Grid) -> Tensor:
    """The nearest integers of the grid, ties to even, as uint8."""
    return (x.double() / grid.step).round().add(grid.zero).clamp(0, grid.top).to(torch.uint8)


def dequantize(q: Tensor, grid: Grid) -> Tensor:
    """The numbers that the integers stand for, in float64."""
    return (q.double() - grid.zero) * grid.step


def product(
    q: Tensor,
    grid: Grid,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    relu: bool = False,
    out: Grid | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """A convolution that keeps the size, then bias, residual and ReLU.

    Args:
        q: `Tensor[N, I, H, W]`, integers of `grid`; outside of the map is what stands for 0.
        weight: `Tensor[O, I, k, k]` int8, k odd.
        scales: `Tensor[O]`, the weight's.
        bias: `Tensor[O]`.
        residual: `Tensor[N, O, H, W]`, is added.
        out: the grid of the result; None: the result as it is.
        dtype: in which sums are taken: float64 is exact, float32 up to 2^24.

    Returns:
        `Tensor[N, O, H, W]`, in `dtype` or, with `out`, uint8.
    """
    sums = conv2d(q.to(dtype) - grid.zero, weight.to(dtype), padding=weight.shape[-1] // 2)
    y = sums * (scales.to(dtype) * grid.step)[:, None, None] + bias.to(dtype)[:, None, None]
    y = y if residual is None else y + residual
    y = y.relu() if relu else y
    return y if out is None else quantize(y, out)
