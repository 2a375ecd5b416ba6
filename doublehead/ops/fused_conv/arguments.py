"""The arguments of the fused convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class FusedConvArguments(NamedTuple):
    """act(conv([x, second]) + bias + residual), rows of maps in and out, or the mean of each map's cells.

    The fields are the arguments of the operator's schema, in its order.
    """

    x: Tensor
    """`Tensor[N * H * W, C]`, the cells of N maps."""
    weight: Tensor
    """`Tensor[out, C]` (with `second`, `[out, C + C2]`), or `Tensor[out, C, 3, 3]`: zero padding by one."""
    bias: Tensor | None
    """`Tensor[out]`"""
    second: Tensor | None
    """`Tensor[N * H * W, C2]`: further input channels."""
    residual: Tensor | None
    """`Tensor[N * H * W, out]`"""
    count: Tensor | None
    """`Tensor[]` int64: maps from this one on are zero in the result; None: none is."""
    size: Sequence[int]
    """(H, W)"""
    relu: bool
    """Whether act is ReLU; else it is the identity."""
    mean: bool
    """Average each map's cells."""
