"""Batch normalisation, residual sum and ReLU in plain PyTorch: the definition, for any device.

Everything is computed in float32 at least (float64 for float64 input) and rounded once, at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._dtypes import accumulation_dtype


def batch_norm_act(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """act((x - mean) * invstd * weight + bias + residual), with the statistics of this batch.

    Args:
        x: `Tensor[M, C]`.
        weight, bias: `Tensor[C]`.
        residual: `Tensor[M, C]` or None.
        relu: whether act is ReLU; else it is the identity.
        eps: added to the (biased) variance.
    Returns:
        y `Tensor[M, C]`; mean and invstd, `Tensor[C]` in the dtype of the computation.
    """
    variance, mean = torch.var_mean(_wide(x), dim=0, correction=0)
    invstd = torch.rsqrt(variance + eps)
    return batch_norm_act_apply(x, mean, invstd, weight, bias, residual, relu), mean, invstd


def batch_norm_act_apply(
    x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool
) -> Tensor:
    """The same with given statistics: what a backward pass recomputes."""
    y = (_wide(x) - mean) * (invstd * weight) + bias
    if residual is not None:
        y = y + residual
    return (y.relu() if relu else y).to(x.dtype)


def batch_norm_act_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor,
    residual: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and residual.

    Args:
        grad: `Tensor[M, C]`, of the result.
        x, mean, invstd, weight: as in the forward.
        y: the result, which is zero where ReLU was at work; None where there was no ReLU.
        residual: whether its gradient is wanted; else an empty tensor takes its place.
    """
    normalised = (_wide(x) - mean) * invstd
    grad = _wide(grad) if y is None else torch.where(y > 0, _wide(grad), 0.0)
    grad_bias, grad_weight = grad.sum(0), (grad * normalised).sum(0)
    grad_x = (grad - (grad_bias + normalised * grad_weight) / x.shape[0]) * (invstd * weight)
    return grad_x.to(x.dtype), grad_weight, grad_bias, grad.to(x.dtype) if residual else x.new_empty(0)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(accumulation_dtype(tensor.dtype))
