"""Features and boxes for the tests of RoIAlign, and how its results are compared.  Needs torch and pytest alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from doublehead.ops.roi_align import reference
from doublehead.ops.roi_align.level_rules import LEVEL_RULES
from doublehead.ops.roi_align.pooling import Pooling

CHANNELS_LAST = torch.channels_last
TORCHVISION = LEVEL_RULES["torchvision"]
LAYOUTS = [torch.contiguous_format, CHANNELS_LAST]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])


def make_features(*shape: int, dtype=torch.float32, layout=torch.contiguous_format, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout)


def make_rois(count: int, images: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Boxes of all sizes, some partly and some wholly outside the map, the last one very small."""
    generator = torch.Generator().manual_seed(seed)
    extent = torch.tensor([width, height, width, height])
    corners = (torch.rand(count, 4, generator=generator) * 1.5 - 0.25) * extent
    boxes = torch.cat([torch.minimum(corners[:, :2], corners[:, 2:]), torch.maximum(corners[:, :2], corners[:, 2:])], 1)
    boxes[-1, 2:] = boxes[-1, :2] + 0.3
    image = torch.randint(images, (count, 1), generator=generator)
    return torch.cat([image, boxes], 1)


def run(function, features: Tensor, rois: Tensor, grad: Tensor, *options) -> tuple[Tensor, Tensor]:
    """Output and gradient."""
    leaf = features.detach().requires_grad_()
    output = function(leaf, rois, *options)
    return output.detach(), torch.autograd.grad(output, leaf, grad.to(output))[0]


def by_reference(features, rois, output_size, spatial_scale, sampling_ratio, aligned):
    pooling = [spatial_scale], [1.0], output_size, sampling_ratio, aligned, 224.0, 4, *TORCHVISION
    return reference.multiscale_roi_align([features], rois, Pooling(*pooling))[0]


def assert_twice_as_good(actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """The error is at most twice that of plain PyTorch in the same dtype (or one rounding of the largest value)."""
    error, allowed = (actual.double() - exact).abs().max(), 2 * (plain.double() - exact).abs().max()
    rounding = torch.finfo(actual.dtype).eps * exact.abs().max()
    assert error <= torch.maximum(allowed, rounding), f"error {error:.3e}, allowed {allowed:.3e}"
