"""Convolution of RoI maps, and what follows it, in plain PyTorch: the definition, for any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d, linear


def fused_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    second: Tensor | None,
    residual: Tensor | None,
    count: Tensor | None,
    size: Sequence[int],
    relu: bool,
    mean: bool,
) -> Tensor:
    """act(conv([x, second]) + bias + residual), rows of maps in and out, or the mean of each map's cells.

    Args:
        x: `Tensor[N * H * W, C]`, the cells of N maps.
        weight: `Tensor[out, C]` (with `second`, `[out, C + C2]`), or `Tensor[out, C, 3, 3]`: zero padding by one.
        bias: `Tensor[out]` or None.
        second: `Tensor[N * H * W, C2]`, further input channels, or None.
        residual: `Tensor[N * H * W, out]` or None.
        count: `Tensor[]` int64: maps from this one on are zero in the result; None: none is.
        size: (H, W).
        relu: whether act is ReLU.
        mean: average each map's cells.
    Returns:
        `Tensor[N * H * W, out]`, with `mean` `Tensor[N, out]`.
    """
    height, width = size
    y = convolve(x if second is None else torch.cat((x, second), dim=1), weight, bias, size)
    y = y if residual is None else y + residual
    y = (y.relu() if relu else y).view(len(x) // (height * width), height * width, len(weight))
    if count is not None:
        y = torch.where(torch.arange(len(y), device=x.device)[:, None, None] < count, y, 0.0)
    return y.mean(1) if mean else y.flatten(0, 1)


def convolve(rows: Tensor, weight: Tensor, bias: Tensor | None, size: Sequence[int]) -> Tensor:
    """A convolution, rows in and rows out; weight `Tensor[out, in]`, `[out, in, 1, 1]` or `[out, in, 3, 3]`."""
    kernel = weight.shape[2] if weight.dim() == 4 else 1
    if kernel == 1 and is_matrix_product(rows):
        return linear(rows, weight.flatten(1), bias)
    return as_rows(
        conv2d(as_maps(rows, size), weight.view(*weight.shape[:2], kernel, kernel), bias, padding=kernel // 2)
    )


def is_matrix_product(rows: Tensor) -> bool:
    """Whether a 1x1 convolution of `rows` may be computed as a matrix product.

    Not float32 on a GPU: PyTorch's switches allow TF32 to convolutions and to matrix products separately.
    """
    return rows.device.type != "cuda" or rows.dtype != torch.float32


def as_maps(rows: Tensor, size: Sequence[int]) -> Tensor:
    """`Tensor[N * H * W, C]` as `Tensor[N, C, H, W]` in channels-last memory, a view."""
    cells = size[0] * size[1]
    return rows.view(len(rows) // cells, *size, rows.shape[1]).permute(0, 3, 1, 2)


def as_rows(maps: Tensor) -> Tensor:
    """`Tensor[N, C, H, W]` as `Tensor[N * H * W, C]`, a view of channels-last memory."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])
