"""The folded conv-head on a GPU: one launch for each convolution and each attention.

Each product is cuBLAS's, cuDNN's or the Triton kernel's, by a fixed table (`fused_conv.engines`); attention and average
are Triton's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._library import Fallback
from .._triton import UNALIGNED, aligned
from ..fused_conv import engines
from ..fused_conv.arguments import FusedConvArguments
from ..fused_conv.engines import Engine
from ..fused_conv.kernel import capability_of, serves
from ..non_local.kernel import non_local_attention
from . import reference
from .arguments import ConvHeadArguments
from .blocks import Block, each_block


def conv_head(head: ConvHeadArguments) -> Tensor:
    """Launches the kernels.  With `head.count` only maps up to it are computed, and no other is read."""
    x, last = head.x, len(head.blocks) - 1
    if not serves(x.dtype):
        return reference.conv_head(head)
    if not aligned(x.shape[1], *head.tensors, *map(len, head.tensors)):
        raise Fallback(UNALIGNED)
    run = _Blocks(head)
    rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])  # a view of channels-last maps
    for index, (block, own) in enumerate(each_block(head.blocks, head.tensors)):
        rows = run(rows, block, own, mean=index == last)
    return rows if run.engines <= {Engine.TRITON} else _show_what_is_not_finite(rows, x)


class _Blocks:
    """The blocks of `head` one by one, on rows of maps, `Tensor[N * H * W, C]`."""

    def __init__(self, head: ConvHeadArguments) -> None:
        self._head, self._capability = head, capability_of(head.x)
        self._available = engines.available(head.x.device, head.x.dtype)
        self.engines: set[Engine] = set()
        """What has run."""

    def __call__(self, rows: Tensor, block: Block, own: Sequence[Tensor], mean: bool) -> Tensor:
        """With `mean`, the average of each map's cells."""
        conv, size = self._conv, self._head.x.shape[2:]
        if block == Block.WIDENING:
            return conv(conv(rows, own[0], own[1]), own[2], own[3], second=rows, mean=mean)
        if block == Block.WIDENING_SHORTCUT_RELU:
            shortcut = conv(rows, own[4], own[5])
            return conv(conv(rows, own[0], own[1]), own[2], own[3], residual=shortcut, mean=mean)
        if block == Block.BOTTLENECK:
            inner = conv(conv(rows, own[0], own[1]), own[2], own[3])
            return conv(inner, own[4], own[5], residual=rows, mean=mean)
        qkv = conv(rows, own[0], own[1], relu=False).view(-1, size[0] * size[1], len(own[0]))
        mixed = non_local_attention(qkv, self._head.attention, self._head.count)
        return conv(mixed.flatten(0, 1), own[2], own[3], residual=rows, relu=self._head.relu, mean=mean)

    def _conv(self, x, weight, bias, *, second=None, residual=None, relu=True, mean=False) -> Tensor:
        count, size = self._head.count, self._head.x.shape[2:]
        conv = FusedConvArguments(x, weight, bias, second, residual, count, size, relu, mean)
        engine = engines.choose(conv, self._capability, self._available)
        self.engines.add(engine)
        return engines.run(conv, engine)


def _show_what_is_not_finite(vectors: Tensor, x: Tensor) -> Tensor:
    """The vectors of the maps `x`, in place; NaN where a map is not finite, which the vendors' ReLU may hide."""
    return vectors.add_(x.sum((1, 2, 3), dtype=torch.float32)[:, None], alpha=0)
