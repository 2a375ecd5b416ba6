"""fused_conv against the same convolution, bias, residual and ReLU in plain PyTorch, on the conv-head's shapes.

On a GPU with every library that can run a shape, to correct the table in `doublehead/ops/fused_conv/engines.py` by.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from inputs import DEVICE, generator

from doublehead.ops import fused_conv
from doublehead.ops.fused_conv import reference
from doublehead.ops.fused_conv.arguments import FusedConvArguments

ROIS = 1000 if DEVICE == "cuda" else 100
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SHAPES = {
    "1x1, 1024 to 256": (256, 1024, 1, ""),
    "1x1, 256 to 1024, residual": (1024, 256, 1, "residual"),
    "3x3, 256 to 256": (256, 256, 3, ""),
    "1x1, 1024 to 1536, no ReLU": (1536, 1024, 1, "linear"),
    "1x1, 512 to 1024, residual": (1024, 512, 1, "residual"),
    "1x1, 256 and 256 to 1024": (1024, 256, 1, "second"),
}
"""Case -> output channels, input channels, side of the kernel, and what is special."""


def by_library(conv: FusedConvArguments) -> dict[str, Callable]:
    """On a GPU the product by each library that can run it."""
    if DEVICE != "cuda":
        return {}
    from doublehead.ops.fused_conv import engines
    from doublehead.ops.fused_conv.engines import Engine

    able = [Engine.TRITON]
    able += [Engine.CUDNN] if conv.relu or conv.residual is None else []
    able += [Engine.CUBLAS] if conv.residual is None and conv.weight.dim() == 2 else []
    return {f"by {engine.name}": lambda engine=engine: engines.run(conv, engine) for engine in able}


@pytest.mark.parametrize("case", SHAPES)
def test_fused_conv(compare, case):
    outputs, inputs, side, special = SHAPES[case]
    both = inputs * (2 if special == "second" else 1)
    random = generator(0)

    def normal(*shape, spread=1.0):
        return (torch.randn(*shape, generator=random, device=DEVICE) * spread).to(DTYPE)

    weight = normal(outputs, both, *([3, 3] if side == 3 else []), spread=(both * side**2) ** -0.5)
    weight = weight.contiguous(memory_format=torch.channels_last) if side == 3 else weight
    x, bias = normal(ROIS * 49, inputs), normal(outputs)
    residual = normal(ROIS * 49, outputs) if special == "residual" else None
    second = normal(ROIS * 49, inputs) if special == "second" else None
    relu = special != "linear"
    arguments = FusedConvArguments(x, weight, bias, second, residual, None, [7, 7], relu, False)
    compare(
        op="fused_conv",
        case=f"fused_conv {case}",
        details={"rois": ROIS, "dtype": str(DTYPE), "gflop": 2 * ROIS * 49 * weight.numel() / 1e9},
        check=lambda actual, expected: torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.05),
        graphs=True,
        providers={
            "reference": lambda: reference.fused_conv(arguments),
            "doublehead": lambda: fused_conv(x, weight, bias, size=(7, 7), second=second, residual=residual, relu=relu),
            **by_library(arguments),
        },
    )
