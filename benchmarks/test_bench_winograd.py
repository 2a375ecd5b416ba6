"""Winograd's 3x3 convolution against the direct one on the shapes of a detector at 800 pixels, on a CPU in float32."""

from __future__ import annotations

import pytest
import torch
from inputs import DEVICE, generator

from doublehead.ops import onednn, winograd

SHAPES = {
    "64 channels, 200 x 200": (1, 64, 200),
    "128 channels, 100 x 100": (1, 128, 100),
    "256 channels, 50 x 50": (1, 256, 50),
    "256 channels, 200 x 200": (1, 256, 200),
    "512 channels, 25 x 25": (1, 512, 25),
    "256 channels, 7 x 7, 64 RoIs": (64, 256, 7),
}
"""Case -> maps, channels in and out, side of a map."""


@pytest.mark.skipif(DEVICE != "cpu", reason="for a CPU")
@pytest.mark.skipif(not onednn.is_available(), reason="this PyTorch has no oneDNN to compare with")
@pytest.mark.parametrize("case", SHAPES)
def test_winograd(compare, case):
    number, channels, side = SHAPES[case]
    random = generator(0)
    x = torch.randn(number, channels, side, side, generator=random).relu_()
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, generator=random) * (2 / (9 * channels)) ** 0.5
    bias = torch.randn(channels, generator=random)
    direct, transformed = onednn.pack(weight, padding=(1, 1), size=x.shape), winograd.pack(weight)

    def check(actual, expected):
        error = (actual.double() - expected.double()).square().mean().sqrt()
        assert error < 1e-5 * expected.double().square().mean().sqrt(), f"off by {error:.3g}, root mean square"

    compare(
        op="winograd",
        case=f"winograd {case}",
        details={"gflop": 2 * number * side**2 * weight.numel() / 1e9},
        check=check,
        providers={
            "PyTorch": lambda: torch.conv2d(x, weight, bias, padding=1).relu_(),
            "oneDNN, fused": lambda: onednn.convolution(x, direct, bias, padding=(1, 1), relu=True),
            "doublehead": lambda: winograd.convolution(x, transformed, bias, channels, relu=True),
        },
    )
