"""Batch norms folded into the convolutions before them, for inference."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops._folded import FoldedWeights, compute_dtype

__all__ = ["FoldedWeights", "compute_dtype", "fold_norm"]


def fold_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that does what `conv` and then `norm` do at inference."""
    scale = torch.rsqrt(norm.running_var + norm.eps) * norm.weight
    mean = norm.running_mean if conv.bias is None else norm.running_mean - conv.bias
    return conv.weight * scale.view(-1, 1, 1, 1), norm.bias - mean * scale
