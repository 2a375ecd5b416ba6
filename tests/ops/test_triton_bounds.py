"""Triton kernels touch no memory but that of their tensors: each tensor lies between two poisoned stretches.

In the interpreter, on the CPU. Stores outside show in the poison; loads outside show where the poison (NaN, or a large
integer) changes a result. Uncovered: a load outside whose value is not used, or that is further away than the poison
reaches; what the compiler for GPUs makes of the kernel; races between programs.
"""

from __future__ import annotations

import pytest
import torch

from doublehead import ops
from doublehead.ops.batch_norm.op import batch_norm_act
from doublehead.ops.fused_conv import fused_conv
from tests.support.interpreter import TRITON_DEVICE

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(TRITON_DEVICE == "cuda", reason="watches the interpreter's launches")

POISON = 1 << 12
"""Elements before and after a tensor."""


def poison_of(dtype: torch.dtype) -> float | int:
    return torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max


@pytest.fixture
def guarded(triton_kernels, monkeypatch):
    """Switched on, every launch gets its tensors in guarded memory; returns the switch, and the kernels launched."""
    from triton.runtime import interpreter

    launch, state = interpreter.GridExecutor.__call__, {"on": False, "kernels": []}

    def guard(tensor: torch.Tensor, buffers: list) -> torch.Tensor:
        reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        flat = tensor.as_strided((reach,), (1,))
        buffer = torch.full((reach + 2 * POISON,), poison_of(tensor.dtype), dtype=tensor.dtype)
        buffer[POISON : POISON + reach] = flat
        buffers.append((flat, buffer))
        return buffer.as_strided(tensor.shape, tensor.stride(), POISON)

    def call(self, *arguments, **options):
        if not state["on"]:
            return launch(self, *arguments, **options)
        buffers: list = []
        launch(self, *(guard(a, buffers) if isinstance(a, torch.Tensor) and a.numel() else a for a in arguments),
               **options)  # fmt: skip
        name = self.fn.__name__
        for index, (flat, buffer) in enumerate(buffers):
            for side in (buffer[:POISON], buffer[POISON + len(flat) :]):
                clean = side.isnan() if side.is_floating_point() else side == poison_of(side.dtype)
                assert clean.all(), f"{name} wrote outside of its tensor {index}"
            flat.copy_(buffer[POISON : POISON + len(flat)])
        state["kernels"].append(name)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", call)
    return state


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def attention(cells: int):
    qkv = normal(2, cells, 96)
    out = torch.ops.doublehead.non_local_attention(qkv, 2, True, 0.3)
    return out, torch.ops.doublehead.non_local_attention_backward(out, qkv, 2, True, 0.3)


def scores():
    fc, conv = normal(3, 81).requires_grad_(), normal(3, 81).requires_grad_()
    fused = torch.ops.doublehead.fuse_scores(fc, conv, "complementary")
    return fused.detach(), *torch.autograd.grad(fused.square().sum(), (fc, conv))


def detections():
    corners = 40 * normal(2, 5, 4).abs()
    proposals = torch.cat((corners[..., :2], corners[..., :2] + corners[..., 2:] + 1), dim=-1)
    sizes, valid = torch.tensor([[90, 110], [70, 130]]), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    return ops.detections([normal(2, 5, 7)], normal(2, 5, 7, 4), proposals, valid, sizes, max_detections=9)


def images():
    pictures = [normal(3, 5, 7), normal(3, 9, 3)]
    return (ops.image_batch(pictures, [(6, 11), (13, 4)], (14, 13), [0.4] * 3, [0.2] * 3),)


def normalised():
    x, weight, bias = normal(37, 48).requires_grad_(), normal(48), normal(48)
    y = batch_norm_act(x, weight, bias, normal(37, 48) * 2)[0]
    return y.detach(), *torch.autograd.grad(y.square().sum(), x)


def convolved():
    """1x1, 3x3, and the average: tiles divide neither the widths nor the rows."""
    x, residual = normal(30, 16), normal(30, 48)
    plain = fused_conv(x, normal(48, 16), normal(48), size=(5, 3), residual=residual, relu=True)
    gathered = fused_conv(x, normal(48, 16, 3, 3), normal(48), size=(5, 3), count=torch.tensor(1))
    return plain, gathered, fused_conv(x, normal(48, 32), size=(5, 3), second=normal(30, 16) * 2, mean=True)


CASES = {
    "convolution": (convolved, {"fused_conv_kernel"}),
    "attention, 9 cells": (lambda: attention(9), {"forward", "backward_whole"}),
    "attention, 65 cells": (lambda: attention(65), {"forward", "backward_queries", "backward_keys"}),
    "scores": (scores, {"_forward", "_backward"}),
    "detections": (detections, {"_candidates", "_gather"}),
    "images": (images, {"_resize"}),
    "batch norm": (normalised, {"statistics_kernel", "join_statistics_kernel", "apply_kernel", "gradient_sums_kernel",
                                "join_gradients_kernel", "gradient_kernel"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_kernels_stay_inside(guarded, case):
    run, kernels = CASES[case]
    guarded["on"] = True
    results = run()
    guarded["on"] = False
    for actual, wanted in zip(results, run(), strict=True):
        assert torch.equal(actual.nan_to_num(7.0), wanted.nan_to_num(7.0)) and actual.dtype == wanted.dtype
    assert set(guarded["kernels"]) == kernels
