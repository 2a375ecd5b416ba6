"""The arguments of the batch normalisation's three operators, each in the order of its schema."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ForwardArguments(NamedTuple):
    """act((x - mean) * invstd * weight + bias + residual), with the statistics of this batch."""

    x: Tensor
    """`Tensor[M, C]`"""
    weight: Tensor
    """`Tensor[C]`"""
    bias: Tensor
    """`Tensor[C]`"""
    residual: Tensor | None
    """`Tensor[M, C]`"""
    relu: bool
    """Whether act is ReLU; else it is the identity."""
    eps: float
    """Added to the (biased) variance."""


class ApplyArguments(NamedTuple):
    """The same with given statistics: what a backward pass recomputes."""

    x: Tensor
    mean: Tensor
    """`Tensor[C]`"""
    invstd: Tensor
    """`Tensor[C]`: (variance + eps) ** -0.5."""
    weight: Tensor
    bias: Tensor
    residual: Tensor | None
    relu: bool


class BackwardArguments(NamedTuple):
    """What the gradients follow from."""

    grad: Tensor
    """`Tensor[M, C]`, of the result."""
    x: Tensor
    y: Tensor | None
    """The result, which is zero where ReLU was at work; None where there was no ReLU."""
    mean: Tensor
    invstd: Tensor
    weight: Tensor
    eps: float
    residual: bool = True
    """Whether the residual's gradient is wanted; otherwise an empty tensor is returned for it."""
