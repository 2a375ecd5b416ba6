"""Score fusion against the same in plain PyTorch, side by side."""

from __future__ import annotations

import pytest
import torch
from inputs import DEVICE

from doublehead.ops import fuse_scores


def plain(fc_logits: torch.Tensor, conv_logits: torch.Tensor) -> torch.Tensor:
    fc, conv = fc_logits.float().softmax(-1), conv_logits.float().softmax(-1)
    return fc + conv * (1 - fc)


compiled = torch.compile(plain) if DEVICE == "cuda" else "only timed on a GPU"


def two_logits(rows: int, classes: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(rows, classes, generator=generator) * 3).to(DEVICE, dtype) for _ in range(2)]


@pytest.mark.parametrize("classes", [81, 1204])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_forward(compare, classes, dtype):
    rows = 2000
    logits = two_logits(rows, classes, dtype)
    name = str(dtype).removeprefix("torch.")
    compare(
        op="score_fusion",
        case=f"fuse_scores forward, {rows} x {classes}, {name}",
        details={"rows": rows, "classes": classes, "dtype": name},
        providers={
            "eager": lambda: plain(*logits),
            "torch.compile": (lambda: compiled(*logits)) if callable(compiled) else compiled,
            "doublehead": lambda: fuse_scores(*logits),
        },
        graphs=True,
        bytes_moved=rows * classes * (2 * logits[0].element_size() + 4),
    )


@pytest.mark.parametrize("classes", [81])
def test_forward_and_backward(compare, classes):
    rows = 2000
    logits = [item.requires_grad_() for item in two_logits(rows, classes, torch.float32)]
    grad = torch.randn(rows, classes, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def both(function):
        return lambda: torch.autograd.grad(function(*logits), logits, grad)

    compare(
        op="score_fusion",
        case=f"fuse_scores forward and backward, {rows} x {classes}, float32",
        details={"rows": rows, "classes": classes, "dtype": "float32"},
        providers={
            "eager": both(plain),
            "torch.compile": both(compiled) if callable(compiled) else compiled,
            "doublehead": both(fuse_scores),
        },
    )
