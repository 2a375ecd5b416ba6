"""The folded conv-head on a GPU: one Triton launch for each convolution and each attention."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .._library import Fallback
from .._triton import UNALIGNED, aligned
from ..fused_conv.arguments import FusedConvArguments
from ..fused_conv.kernel import fused_conv, serves
from ..non_local.kernel import non_local_attention
from . import reference
from .arguments import ConvHeadArguments
from .blocks import Block, each_block


def conv_head(head: ConvHeadArguments) -> Tensor:
    """Launches the kernels.  Only maps up to `head.count` are computed, and no other is read."""
    x, last = head.x, len(head.blocks) - 1
    if not serves(x.dtype):
        return reference.conv_head(head)
    if not aligned(x.shape[1], *head.tensors, *map(len, head.tensors)):
        raise Fallback(UNALIGNED)
    rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])  # a view of channels-last maps
    for index, (block, own) in enumerate(each_block(head.blocks, head.tensors)):
        rows = _block(rows, block, own, head, mean=index == last)
    return rows


def _block(rows: Tensor, block: Block, own: Sequence[Tensor], head: ConvHeadArguments, mean: bool) -> Tensor:
    """One block on rows of maps, `Tensor[N * H * W, C]`; with `mean`, the average of each map's cells."""
    count, size = head.count, head.x.shape[2:]

    def conv(x, weight, bias, *, second=None, residual=None, relu=True, mean=False):
        arguments = FusedConvArguments(x, weight, bias, second, residual, count, size, relu, mean)
        return fused_conv(arguments, fill=False)

    if block == Block.WIDENING:
        return conv(conv(rows, own[0], own[1]), own[2], own[3], second=rows, mean=mean)
    if block == Block.WIDENING_SHORTCUT_RELU:
        shortcut = conv(rows, own[4], own[5])
        return conv(conv(rows, own[0], own[1]), own[2], own[3], residual=shortcut, mean=mean)
    if block == Block.BOTTLENECK:
        inner = conv(conv(rows, own[0], own[1]), own[2], own[3])
        return conv(inner, own[4], own[5], residual=rows, mean=mean)
    qkv = conv(rows, own[0], own[1], relu=False)
    mixed = non_local_attention(qkv.view(-1, size[0] * size[1], qkv.shape[1]), head.attention, count)
    return conv(mixed.flatten(0, 1), own[2], own[3], residual=rows, relu=head.relu, mean=mean)
