"""The folded conv-head on a GPU: one Triton launch a convolution, one an attention."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .._library import Fallback
from .._triton import UNALIGNED, aligned
from ..fused_conv.kernel import fused_conv, serves
from ..non_local.kernel import non_local_attention
from . import reference
from .blocks import Attention, Block, each_block


def conv_head(x: Tensor, tensors: Sequence[Tensor], blocks: Sequence[int], count: Tensor | None, *attention) -> Tensor:
    """The operator's arguments, in order.  Only maps up to `count` are computed, and no other is read."""
    if not serves(x.dtype):
        return reference.conv_head(x, tensors, blocks, count, *attention)
    if not aligned(x.shape[1], *tensors, *map(len, tensors)):
        raise Fallback(UNALIGNED)
    number, channels, *size = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(-1, channels)  # a view of channels-last maps
    last = len(blocks) - 1
    for index, (block, own) in enumerate(each_block(blocks, tensors)):
        rows = _block(rows, block, own, count, size, Attention(*attention), mean=index == last)
    return rows


def _block(rows, block: Block, own, count, size, attention: Attention, mean: bool) -> Tensor:
    def conv(x, weight, bias, relu=True, **more):
        second, residual = more.get("second"), more.get("residual")
        return fused_conv(x, weight, bias, second, residual, count, size, relu, more.get("mean", False), fill=False)

    if block == Block.WIDENING:
        return conv(conv(rows, own[0], own[1]), own[2], own[3], second=rows, mean=mean)
    if block == Block.WIDENING_SHORTCUT_RELU:
        shortcut = conv(rows, own[4], own[5])
        return conv(conv(rows, own[0], own[1]), own[2], own[3], residual=shortcut, mean=mean)
    if block == Block.BOTTLENECK:
        inner = conv(conv(rows, own[0], own[1]), own[2], own[3])
        return conv(inner, own[4], own[5], residual=rows, mean=mean)
    qkv = conv(rows, own[0], own[1], relu=False)
    mixed = non_local_attention(
        qkv.view(-1, size[0] * size[1], qkv.shape[1]), attention.groups, attention.softmax, attention.scale, count
    )
    return conv(mixed.flatten(0, 1), own[2], own[3], relu=attention.relu, residual=rows, mean=mean)
