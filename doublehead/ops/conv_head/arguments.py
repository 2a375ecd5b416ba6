"""The arguments of the folded conv-head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..non_local.attention import Attention


class ConvHeadArguments(NamedTuple):
    """A conv-head and the maps that go through it."""

    x: Tensor
    """`Tensor[N, C, H, W]`"""
    tensors: Sequence[Tensor]
    """Weights and biases of all blocks, one after the other: see `Block`."""
    blocks: Sequence[int]
    """Kinds of block, in order."""
    count: Tensor | None
    """`Tensor[]` int64: only the first `count` maps matter, the result of the others is zero.  None: all."""
    attention: Attention
    """How the non-local blocks pair cells."""
    relu: bool
    """Whether non-local blocks end with ReLU."""


def pack(x, tensors, blocks, count, groups, softmax, scale, relu) -> tuple[ConvHeadArguments]:
    """The schema's arguments, packed."""
    return (ConvHeadArguments(x, tensors, blocks, count, Attention(groups, softmax, scale), relu),)
