"""fused_conv against the same convolution, bias, residual and ReLU in plain PyTorch, on the conv-head's shapes."""

from __future__ import annotations

import pytest
import torch
from inputs import DEVICE, generator

from doublehead.ops import fused_conv
from doublehead.ops.fused_conv import reference
from doublehead.ops.fused_conv.arguments import FusedConvArguments

ROIS = 1000 if DEVICE == "cuda" else 100
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SHAPES = {
    "1x1, 1024 to 256": (256, 1024, 1, False),
    "1x1, 256 to 1024, residual": (1024, 256, 1, True),
    "3x3, 256 to 256": (256, 256, 3, False),
}
"""Case -> output channels, input channels, side of the kernel, residual."""


@pytest.mark.parametrize("case", SHAPES)
def test_fused_conv(compare, case):
    outputs, inputs, side, has_residual = SHAPES[case]
    random = generator(0)

    def normal(*shape, spread=1.0):
        return (torch.randn(*shape, generator=random, device=DEVICE) * spread).to(DTYPE)

    weight = normal(outputs, inputs, *([3, 3] if side == 3 else []), spread=(inputs * side**2) ** -0.5)
    weight = weight.contiguous(memory_format=torch.channels_last) if side == 3 else weight
    x, bias = normal(ROIS * 49, inputs), normal(outputs)
    residual = normal(ROIS * 49, outputs) if has_residual else None
    arguments = FusedConvArguments(x, weight, bias, None, residual, None, [7, 7], True, False)
    compare(
        op="fused_conv",
        case=f"fused_conv {case}",
        details={"rois": ROIS, "dtype": str(DTYPE), "gflop": 2 * ROIS * 49 * weight.numel() / 1e9},
        check=lambda actual, expected: torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.05),
        graphs=True,
        providers={
            "reference": lambda: reference.fused_conv(arguments),
            "doublehead": lambda: fused_conv(x, weight, bias, size=(7, 7), residual=residual, relu=True),
        },
    )
