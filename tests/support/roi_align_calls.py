"""Calls of the RoIAlign operators on a small pyramid."""

from __future__ import annotations

import torch
from torch import Tensor

from doublehead.ops.roi_align.level_rules import LEVEL_RULES

FORWARD = torch.ops.doublehead.pyramid_roi_align.default
BACKWARD = torch.ops.doublehead.pyramid_roi_align_backward.default
POOLING = [0.5, 0.25], [1.0, 1.3], [3, 5], 2, False, 56.0, 3, *LEVEL_RULES["torchvision"]


def make_pyramid(layout=torch.contiguous_format, dtype=torch.float32, requires_grad=False) -> list[Tensor]:
    torch.manual_seed(0)
    features = [torch.randn(2, 18, 24, 20), torch.randn(2, 18, 12, 10)]
    return [f.to(dtype).contiguous(memory_format=layout).requires_grad_(requires_grad) for f in features]


def pyramid_rois() -> Tensor:
    return torch.tensor([[0.0, 1, 2, 20, 30], [1, 4, 4, 39, 47], [1, -5, 3, 9, 9.5], [0, 30, 30, 80, 90]])


def pool_and_differentiate(function, features, rois) -> list[Tensor]:
    leaves = [feature.detach().requires_grad_() for feature in features]
    outputs = function(leaves, rois)
    loss = sum((output.float() ** 2).sum() for output in outputs)
    return [output.detach() for output in outputs] + list(torch.autograd.grad(loss, leaves))
