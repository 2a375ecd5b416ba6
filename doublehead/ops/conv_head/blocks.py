"""The blocks of a conv-head, as the operator takes them."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence

from torch import Tensor


class Block(enum.IntEnum):
    """What a block computes, and the folded weights it takes, in this order.

    A convolution k x k has a weight `Tensor[out, in, k, k]` in channels-last memory, a 1 x 1 convolution a
    `Tensor[out, in]`, each a bias `Tensor[out]`.
    """

    WIDENING = 0
    """relu(W [relu(3x3(x)), x]): 3x3 weight, bias; W `Tensor[out, 2 * in]`, the 1x1 of the residual beside that of the
    shortcut, and the sum of their biases."""
    WIDENING_SHORTCUT_RELU = 1
    """relu(1x1(relu(3x3(x))) + relu(shortcut(x))), MMDetection's: 3x3, 1x1, shortcut, each weight and bias."""
    BOTTLENECK = 2
    """relu(1x1(relu(3x3(relu(1x1(x))))) + x): 1x1, 3x3, 1x1, each weight and bias."""
    NON_LOCAL = 3
    """x + out(attention(qkv(x))), and ReLU if asked for: qkv, out, each weight and bias."""


TENSORS = {Block.WIDENING: 4, Block.WIDENING_SHORTCUT_RELU: 6, Block.BOTTLENECK: 6, Block.NON_LOCAL: 4}
"""How many weights and biases a block takes."""


def each_block(blocks: Sequence[int], tensors: Sequence[Tensor]) -> Iterator[tuple[Block, Sequence[Tensor]]]:
    """Each block with its tensors."""
    begin = 0
    for block in map(Block, blocks):
        yield block, tensors[begin : begin + TENSORS[block]]
        begin += TENSORS[block]
