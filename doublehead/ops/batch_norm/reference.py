"""Batch normalisation, residual sum and ReLU in plain PyTorch: the definition, for any device.

Everything is computed in float32 at least (float64 for float64 input) and rounded once, at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._dtypes import accumulation_dtype
from .arguments import ApplyArguments, BackwardArguments, ForwardArguments


def batch_norm_act(args: ForwardArguments) -> tuple[Tensor, Tensor, Tensor]:
    """y `Tensor[M, C]`; mean and invstd, `Tensor[C]` in the dtype of the computation."""
    variance, mean = torch.var_mean(_wide(args.x), dim=0, correction=0)
    invstd = torch.rsqrt(variance + args.eps)
    y = batch_norm_act_apply(ApplyArguments(args.x, mean, invstd, args.weight, args.bias, args.residual, args.relu))
    return y, mean, invstd


def batch_norm_act_apply(args: ApplyArguments) -> Tensor:
    """y `Tensor[M, C]`."""
    y = (_wide(args.x) - args.mean) * (args.invstd * args.weight) + args.bias
    if args.residual is not None:
        y = y + args.residual
    return (y.relu() if args.relu else y).to(args.x.dtype)


def batch_norm_act_backward(args: BackwardArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and residual, in new memory all of them: who asks may write into them."""
    x, y = args.x, args.y
    normalised = (_wide(x) - args.mean) * args.invstd
    grad = _wide(args.grad) if y is None else torch.where(y > 0, _wide(args.grad), 0.0)
    grad_bias, grad_weight = grad.sum(0), (grad * normalised).sum(0)
    grad_x = (grad - (grad_bias + normalised * grad_weight) / x.shape[0]) * (args.invstd * args.weight)
    grad_residual = grad.to(x.dtype, copy=y is None) if args.residual else x.new_empty(0)
    return grad_x.to(x.dtype), grad_weight, grad_bias, grad_residual


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(accumulation_dtype(tensor.dtype))
