"""Batch norms inside autograd functions that keep their own record: the operators themselves, without checks.

To be called inside `_library.without_layers`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .._library import kernel
from . import op  # noqa: F401  (defines the operators)


class Norm(NamedTuple):
    """The parameters of a batch norm."""

    weight: Tensor
    """`Tensor[C]`"""
    bias: Tensor
    """`Tensor[C]`"""
    eps: float


class Statistics(NamedTuple):
    """What a batch norm has computed of its batch."""

    mean: Tensor
    """`Tensor[C]`"""
    invstd: Tensor
    """`Tensor[C]`: (biased variance + eps) ** -0.5."""


def normalize(
    x: Tensor, norm: Norm, residual: Tensor | None = None, relu: bool = True
) -> tuple[Tensor, Statistics]:  # fmt: skip
    """`act(norm(x) + residual)`, rows in and rows out, by the statistics of x."""
    y, *statistics = kernel("batch_norm_act", x)(x, norm.weight, norm.bias, residual, relu, float(norm.eps))
    return y, Statistics(*statistics)


def normalize_again(
    x: Tensor, norm: Norm, statistics: Statistics, residual: Tensor | None = None, relu: bool = True
) -> Tensor:
    """The same bits from the same statistics."""
    return kernel("batch_norm_act_apply", x)(x, *statistics, norm.weight, norm.bias, residual, relu)


def normalize_backward(
    grad: Tensor, x: Tensor, y: Tensor | None, norm: Norm, statistics: Statistics, residual: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of x, of the norm's weight and bias, and with `residual` of the residual, else None.

    `y`: the result where ReLU was at work, else None.
    """
    backward = kernel("batch_norm_act_backward", x)
    *grads, of_residual = backward(grad, x, y, *statistics, norm.weight, float(norm.eps), residual)
    return *grads, of_residual if residual else None
