"""Batch norms folded into the convolutions before them, for inference."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops._dtypes import layer_dtype
from ..ops._folded import FoldedWeights, has_inner_hooks

__all__ = ["FoldedWeights", "fold_norm", "has_inner_hooks", "layer_dtype", "needs_grad"]


def needs_grad(module: nn.Module, x: Tensor) -> bool:
    """Whether a backward may follow the call of `module` on `x`: folded weights have no gradients."""
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters()))


def fold_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that does what `conv` and then `norm` do at inference.

    In their dtype; 16-bit ones are rounded once, at the end.
    """
    dtype = conv.weight.dtype
    wide = torch.promote_types(dtype, torch.float32)
    scale = torch.rsqrt(norm.running_var.to(wide) + norm.eps) * norm.weight.to(wide)
    mean = norm.running_mean.to(wide) if conv.bias is None else norm.running_mean.to(wide) - conv.bias.to(wide)
    weight, bias = conv.weight.to(wide) * scale.view(-1, 1, 1, 1), norm.bias.to(wide) - mean * scale
    return weight.to(dtype), bias.to(dtype)
