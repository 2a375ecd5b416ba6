"""Batch norms folded into the convolutions before them, for inference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops import cudnn
from ..ops._dtypes import accumulation_dtype, layer_dtype
from ..ops._folded import FoldedWeights, has_inner_hooks, is_plain_conv

__all__ = [
    "FoldedWeights",
    "fold_norm",
    "has_inner_hooks",
    "have_kinds",
    "is_like",
    "layer_dtype",
    "needs_grad",
    "show_what_is_not_finite",
]


def needs_grad(module: nn.Module, x: Tensor) -> bool:
    """Whether a backward may follow the call of `module` on `x`: folded weights have no gradients."""
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters()))


def is_like(layers: nn.Module, kinds: str) -> bool:
    """Whether `layers`, an `nn.Sequential`, are still those that a fused path computes: others may have replaced them.

    Args:
        kinds: a letter for each layer: c, a plain convolution; n, a norm with statistics; r, ReLU; l, a linear layer
            with bias; f, flatten; a, the average over cells.
    """
    return type(layers) is nn.Sequential and have_kinds(list(layers), kinds)


def have_kinds(layers: Sequence[nn.Module], kinds: str) -> bool:
    """As `is_like`, for a list of layers."""
    return len(layers) == len(kinds) and all(_KINDS[kind](layer) for layer, kind in zip(layers, kinds, strict=True))


_KINDS = {
    "c": is_plain_conv,
    "n": lambda layer: hasattr(layer, "running_var"),
    "r": lambda layer: type(layer) is nn.ReLU,
    "l": lambda layer: type(layer) is nn.Linear and layer.bias is not None,
    "f": lambda layer: type(layer) is nn.Flatten,
    "a": lambda layer: type(layer) is nn.AdaptiveAvgPool2d,
}


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


def show_what_is_not_finite(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The weights and biases of a network, the last of them NaN if one is not finite, where ReLUs may hide that.

    On a GPU they do, in kernels of cuDNN and cuBLAS, and a broken model would seem to see nothing special.  Costs no
    wait for the device.
    """
    last = tensors[-1]
    if last.device.type not in cudnn.DEVICES:
        return list(tensors)
    sums = torch.stack([tensor.sum(dtype=accumulation_dtype(tensor.dtype)) for tensor in tensors])
    return [*tensors[:-1], last + (0 * sums.sum()).to(last.dtype)]
