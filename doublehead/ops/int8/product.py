"""Products of 8-bit integers by oneDNN's convolutions, through the operators that PyTorch's compiler calls."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .grid import Grid, quantize_weight


class PackedWeight(NamedTuple):
    """A quantised weight in the layout that oneDNN prefers, and all that its product needs beside the input."""

    weight: Tensor
    """Opaque."""
    scales: Tensor
    """`Tensor[O]` float32."""
    zeros: Tensor
    """`Tensor[O]` int64: weights are symmetric."""
    bias: Tensor
    """`Tensor[O]` float32."""
    grid: Grid
    """Of the input."""
    padding: int


def pack(weight: Tensor, bias: Tensor, grid: Grid) -> PackedWeight:
    """Quantise and pack a convolution that keeps the size.

    Args:
        weight: `Tensor[O, I, k, k]`, k odd, on the CPU.
        bias: `Tensor[O]`.
        grid: of the inputs to come.
    """
    padding = weight.shape[-1] // 2
    q, scales = quantize_weight(weight)
    packed = torch.ops.onednn.qconv_prepack(
        q, scales, grid.step, grid.zero, [1, 1], [padding, padding], [1, 1], 1, None
    )
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    return PackedWeight(packed, scales, zeros, bias.to(torch.float32).contiguous(), grid, padding)


def product(q: Tensor, packed: PackedWeight, relu: bool = False, out: Grid | None = None) -> Tensor:
    """Convolution, bias and ReLU.

    Args:
        q: `Tensor[N, I, H, W]` uint8, channels-last, integers of `packed.grid`.
        out: the grid of the result, whose zero is 0; for results that end with ReLU.  None: float32.

    Returns:
        `Tensor[N, O, H, W]`, channels-last, float32 or, with `out`, uint8.
    """
    after: tuple[str, list[float]] = ("relu" if relu else "none", [])
    if out is not None and out.top < 255:  # oneDNN cuts off at 255 alone
        after = "hardtanh", [0.0, out.top * out.step]
    return torch.ops.onednn.qconv2d_pointwise(
        q, *_common(packed), out.step if out else 1.0, 0, torch.uint8 if out else torch.float32, *after, ""
    )


def add_product(to: Tensor, q: Tensor, packed: PackedWeight, relu: bool = False) -> Tensor:
    """Convolution and bias added to `to`, then ReLU.

    Args:
        to: `Tensor[N, O, H, W]` float32, channels-last; its memory holds the result or nothing of use afterwards.
        q: as in `product`.

    Returns:
        `Tensor[N, O, H, W]`, float32, channels-last.
    """
    after = ("sum", 1.0, "relu" if relu else None, [], "")
    # The first two: of the result, and of `to`.
    grids = (1.0, 0, torch.float32, 1.0, 0)
    return torch.ops.onednn.qconv2d_pointwise.binary(q, *_common(packed, to), *grids, *after)


def _common(packed: PackedWeight, to: Tensor | None = None) -> tuple:
    """The arguments of the operators from the input's scale to the number of groups."""
    grid, padding = packed.grid, [packed.padding] * 2
    weight = packed.weight, packed.scales, packed.zeros
    added = () if to is None else (to,)
    return grid.step, grid.zero, *weight, *added, packed.bias, [1, 1], padding, [1, 1], 1
