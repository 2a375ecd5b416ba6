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


def pack(weight: Tensor, bias: Tensor, grid: Grid, added: bool = False) -> PackedWeight:
    """Quantise and pack a convolution that keeps the size.

    Args:
        weight: `Tensor[O, I, k, k]`, k odd, on the CPU.
        bias: `Tensor[O]`.
        grid: of the inputs to come.
        added: for `add_product` instead of `product`; then k is 1.
    """
    padding = weight.shape[-1] // 2
    q, scales = quantize_weight(weight)
    if added:
        packed = torch.ops.onednn.qlinear_prepack(q.flatten(1), None)
    else:
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
    grid, padding = packed.grid, [packed.padding] * 2
    return torch.ops.onednn.qconv2d_pointwise(
        q, grid.step, grid.zero, packed.weight, packed.scales, packed.zeros, packed.bias, [1, 1], padding, [1, 1], 1,
        out.step if out else 1.0, 0, torch.uint8 if out else torch.float32, *after, "",
    )  # fmt: skip


def add_product(to: Tensor, q: Tensor, packed: PackedWeight, relu: bool = False) -> Tensor:
    """1x1 convolution and bias added to `to`, in place, then ReLU; returns `to`.

    Args:
        to: `Tensor[N, O, H, W]` float32, channels-last.
        q: as in `product`.
        packed: with `added`.  It is a linear layer: oneDNN's convolution would copy the result in some versions of
            PyTorch.
    """
    grid, rows = packed.grid, to.permute(0, 2, 3, 1).view(-1, to.shape[1])
    result = torch.ops.onednn.qlinear_pointwise.binary(
        q.permute(0, 2, 3, 1).reshape(len(rows), -1), grid.step, grid.zero, packed.weight, packed.scales, packed.zeros,
        rows, packed.bias, 1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, "relu" if relu else "none", [], "",
    )  # fmt: skip
    return result.view(to.shape[0], *to.shape[2:], to.shape[1]).permute(0, 3, 1, 2)
