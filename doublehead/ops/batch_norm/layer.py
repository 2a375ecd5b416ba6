"""Batch norms inside autograd functions that keep their own record: the operators themselves, without checks.

To be called below autograd and autocast (`_library.below_autograd`, `without_autocast`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import op  # noqa: F401  (defines the operators)

_forward = torch.ops.doublehead.batch_norm_act.default
_apply = torch.ops.doublehead.batch_norm_act_apply.default
_backward = torch.ops.doublehead.batch_norm_act_backward.default


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
    y, *statistics = _forward(x, norm.weight, norm.bias, residual, relu, norm.eps)
    return y, Statistics(*statistics)


def normalize_again(
    x: Tensor, norm: Norm, statistics: Statistics, residual: Tensor | None = None, relu: bool = True
) -> Tensor:
    """The same bits from the same statistics."""
    return _apply(x, *statistics, norm.weight, norm.bias, residual, relu)


def normalize_backward(
    grad: Tensor, x: Tensor, y: Tensor | None, norm: Norm, statistics: Statistics, residual: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of x, of the norm's weight and bias, and with `residual` of the residual, else None.

    `y`: the result where ReLU was at work, else None.
    """
    *grads, of_residual = _backward(grad, x, y, *statistics, norm.weight, norm.eps, residual)
    return *grads, of_residual if residual else None
