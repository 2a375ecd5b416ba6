"""batch_norm_act against torch's batch norm, addition and ReLU one after the other, forward and backward."""

from __future__ import annotations

import pytest
import torch
from inputs import DEVICE, generator
from torch.nn.functional import batch_norm

from doublehead.ops import batch_norm_act

ROIS = 1000 if DEVICE == "cuda" else 100
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


@pytest.mark.parametrize("channels", [256, 1024])
def test_forward_and_backward(compare, channels):
    options = {"generator": generator(0), "device": DEVICE}
    rows = ROIS * 49
    x, residual, grad = (torch.randn(rows, channels, **options).to(DTYPE) for _ in range(3))
    weight, bias = (torch.rand(channels, **options).requires_grad_() for _ in range(2))
    leaves = (x.requires_grad_(), weight, bias, residual.requires_grad_())

    def torch_modules():
        maps = x.view(ROIS, 7, 7, channels).permute(0, 3, 1, 2)
        y = batch_norm(maps, None, None, weight, bias, training=True).permute(0, 2, 3, 1).reshape(rows, channels)
        return (y + residual).relu()

    def both(function):
        return lambda: torch.autograd.grad(function(), leaves, grad)

    def check(actual, expected):
        for ours, theirs in zip(actual, expected, strict=True):  # next to ReLU's kink single entries may differ
            assert (ours.double() - theirs.double()).norm() <= 0.02 * theirs.double().norm()

    compare(
        op="batch_norm",
        case=f"batch_norm_act forward and backward, {channels} channels",
        details={"rois": ROIS, "rows": rows, "channels": channels, "dtype": str(DTYPE)},
        check=check,
        providers={
            "reference": both(torch_modules),
            "doublehead": both(lambda: batch_norm_act(x, weight, bias, residual)[0]),
        },
    )
