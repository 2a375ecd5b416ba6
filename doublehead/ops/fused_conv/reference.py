"""Convolution of RoI maps, and what follows it, in plain PyTorch: the definition, for any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d, linear

from .arguments import FusedConvArguments


def fused_conv(conv: FusedConvArguments) -> Tensor:
    """`Tensor[N * H * W, out]`, with `mean` `Tensor[N, out]`."""
    x, cells = conv.x, conv.size[0] * conv.size[1]
    x = x if conv.second is None else torch.cat((x, conv.second), dim=1)
    y = convolve(x, conv.weight, conv.bias, conv.size)
    y = y if conv.residual is None else y + conv.residual
    y = (y.relu() if conv.relu else y).view(len(x) // cells, cells, len(conv.weight))
    if conv.count is not None:
        y = torch.where(torch.arange(len(y), device=x.device)[:, None, None] < conv.count, y, 0.0)
    return y.mean(1) if conv.mean else y.flatten(0, 1)


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
    return rows.view(rows.shape[0] // cells, *size, rows.shape[1]).permute(0, 3, 1, 2)


def as_rows(maps: Tensor) -> Tensor:
    """`Tensor[N, C, H, W]` as `Tensor[N * H * W, C]`, a view of channels-last memory."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])
