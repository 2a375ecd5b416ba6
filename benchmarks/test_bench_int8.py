"""Products of 8-bit integers against the same numbers in float32, on the conv-head's shapes, on a CPU."""

from __future__ import annotations

import pytest
import torch
from inputs import DEVICE, generator

from doublehead.ops import int8, onednn

ROIS = 32
"""As many as the conv-head computes at a time."""
SHAPES = {
    "1x1, 1024 to 256": (256, 1024, 1),
    "1x1, 1024 to 1536": (1536, 1024, 1),
    "3x3, 256 to 256": (256, 256, 3),
}
"""Case -> output channels, input channels, side of the kernel."""


@pytest.mark.skipif(DEVICE != "cpu", reason="for a CPU")
@pytest.mark.skipif(int8.int8_support().level == "none", reason=int8.int8_support().reason)
@pytest.mark.skipif(not onednn.is_available(), reason="this PyTorch has no oneDNN to compare with")
@pytest.mark.parametrize("case", SHAPES)
def test_int8(compare, case):
    outputs, inputs, side = SHAPES[case]
    random = generator(0)
    grid = int8.grid_of(0.02, signed=False, bits=int8.int8_support().bits)
    q = torch.randint(0, grid.top + 1, (ROIS, inputs, 7, 7), generator=random, dtype=torch.uint8)
    q = q.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(outputs, inputs, side, side, generator=random) * (inputs * side**2) ** -0.5
    bias = torch.randn(outputs, generator=random)
    packed, (integers, scales) = int8.pack(weight, bias, grid), int8.quantize_weight(weight)
    # What the integers stand for: float32 must find the same.
    x, exact, padding = q * grid.step, integers * scales.view(-1, 1, 1, 1), (side // 2, side // 2)
    direct = onednn.pack(exact, padding=padding, size=x.shape)
    compare(
        op="int8",
        case=f"int8 {case}",
        details={"rois": ROIS, "bits": int8.int8_support().bits, "gflop": 2 * ROIS * 49 * weight.numel() / 1e9},
        check=lambda actual, expected: torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4),
        providers={
            "oneDNN, fp32": lambda: onednn.convolution(x, direct, bias, padding=padding, relu=True),
            "doublehead": lambda: int8.product(q, packed, relu=True),
        },
    )
