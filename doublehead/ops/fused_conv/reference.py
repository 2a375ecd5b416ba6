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
    if weight.dim() == 2:
        y = linear(x if second is None else torch.cat((x, second), dim=1), weight, bias)
    else:
        maps = x.view(len(x) // (height * width), height, width, x.shape[1]).permute(0, 3, 1, 2)
        y = conv2d(maps, weight, bias, padding=1).permute(0, 2, 3, 1).reshape(len(x), len(weight))
    y = y if residual is None else y + residual
    y = (y.relu() if relu else y).view(len(x) // (height * width), height * width, len(weight))
    if count is not None:
        y = torch.where(torch.arange(len(y), device=x.device)[:, None, None] < count, y, 0.0)
    return y.mean(1) if mean else y.flatten(0, 1)
