"""The Triton kernels of the non-local block: in the interpreter, or on a GPU, against float64."""

from __future__ import annotations

import pytest
import torch

from doublehead.ops import non_local
from tests.support.non_local_cases import OPERATORS, check_twice, exact, qkv_and_grad, rounded
from tests.support.triton_bfloat16 import upcast_products  # noqa: F401  (a fixture)

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("upcast_products")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ALL = ["fp32", "fp16", "bf16"]


@pytest.fixture
def poisoned(monkeypatch):
    """What the launchers allocate holds NaN: a place that a kernel forgets shows."""
    from doublehead.ops.non_local import kernel

    class Poisoned:
        def __getattr__(self, name):
            return getattr(torch, name)

        @staticmethod
        def empty(shape, **options):
            return torch.full(shape, torch.nan, **options)

        @staticmethod
        def empty_like(tensor, **options):
            return torch.full_like(tensor, torch.nan, **options)

    monkeypatch.setattr(kernel, "torch", Poisoned())


def run(device: str, qkv, grad, *attention):
    """Result and gradient of `qkv`, by the operator and its autograd."""
    qkv = qkv.detach().clone().to(device).requires_grad_()
    out = OPERATORS.non_local_attention(qkv, *attention)
    return out.detach(), torch.autograd.grad(out, qkv, grad.to(device))[0]


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize(
    ("number", "cells", "groups", "width"),
    [
        (2, 1, 1, 16),
        (2, 49, 4, 48),
        (2, 49, 1, 128),
        (1, 49, 1, 512),
        (2, 60, 1, 16),
        (1, 63, 4, 16),
        (2, 64, 1, 48),
        (1, 65, 4, 16),
        (1, 65, 1, 128),
        (1, 100, 1, 80),
        (1, 196, 1, 48),
    ],
)
def test_kernel_is_as_exact_as_pytorch(triton_kernels, poisoned, number, cells, groups, width, softmax, dtype):
    qkv, grad = qkv_and_grad(number, cells, groups * width, DTYPES[dtype])
    attention = groups, softmax, 0.3 * width**-0.5 if softmax else 1 / cells
    results = run(triton_kernels, qkv, grad, *attention)
    expected = exact(qkv, grad, *attention)
    for actual, plain, truth in zip(results, rounded(qkv, grad, *attention), expected, strict=True):
        check_twice(actual, plain, truth)


@pytest.mark.parametrize("cells", [49, 70])
@pytest.mark.parametrize("dtype", ALL)
def test_large_logits(triton_kernels, poisoned, cells, dtype):
    # Pairwise products of some 10^5: beyond fp16, and their exponentials beyond float64. They are exact in any order of
    # additions: a rounding of 10^5 would be a factor of the weights, and orders differ from processor to processor.
    qkv, grad = qkv_and_grad(1, cells, 64, DTYPES[dtype], size=100.0)
    qkv, grad = qkv.round(), (8 * grad).round() / 8
    assert (qkv[0, :, :64].double() @ qkv[0, :, 64:128].double().T).abs().max() > 2e5
    results = run(triton_kernels, qkv, grad, 1, True, 1.0)
    expected = exact(qkv, grad, 1, True, 1.0)
    for actual, plain, truth in zip(results, rounded(qkv, grad, 1, True, 1.0), expected, strict=True):
        assert plain.isfinite().all()
        check_twice(actual, plain, truth)


@pytest.mark.parametrize("cells", [49, 70])
def test_logits_that_are_all_far_below_zero(triton_kernels, poisoned, cells):
    # Masked keys have a product of 0, far above all others: they must not take the softmax, nor its gradient.
    qkv, grad = qkv_and_grad(1, cells, 16, torch.float32)
    qkv, grad = (16 * qkv).round() / 16, (8 * grad).round() / 8  # products are exact in any order of additions
    qkv[..., :16], qkv[..., 16:32] = qkv[..., :16] + 20, qkv[..., 16:32] - 20
    results = run(triton_kernels, qkv, grad, 1, True, 1.0)
    expected = exact(qkv, grad, 1, True, 1.0)
    for actual, plain, truth in zip(results, rounded(qkv, grad, 1, True, 1.0), expected, strict=True):
        check_twice(actual, plain, truth)


@pytest.mark.parametrize("cells", [49, 70])
@pytest.mark.parametrize("softmax", [False, True])
def test_a_roi_with_nan_leaves_the_others_alone(triton_kernels, cells, softmax):
    qkv, grad = qkv_and_grad(3, cells, 32, torch.float32)
    clean = run(triton_kernels, qkv, grad, 2, softmax, 0.1)
    qkv[1] = torch.nan
    for actual, expected in zip(run(triton_kernels, qkv, grad, 2, softmax, 0.1), clean, strict=True):
        assert torch.equal(actual[::2], expected[::2]) and actual[1].isnan().all()


def test_strided_inputs(triton_kernels):
    wide, _ = qkv_and_grad(2, 20, 64, torch.float32)
    # Rows further apart than they are long. Cut out on the device: a copy to it would close the gaps.
    qkv, grad = wide[..., :96], torch.randn(2, 32, 20).transpose(1, 2)
    inputs = wide.to(triton_kernels)[..., :96], grad.to(triton_kernels)
    assert not any(tensor.is_contiguous() for tensor in inputs)
    out = OPERATORS.non_local_attention(inputs[0], 1, True, 0.2)
    grad_qkv = OPERATORS.non_local_attention_backward(inputs[1], inputs[0], 1, True, 0.2)
    for actual, expected in zip((out, grad_qkv), rounded(qkv, grad, 1, True, 0.2), strict=True):
        torch.testing.assert_close(actual.cpu(), expected)


@pytest.mark.parametrize(
    ("number", "cells", "width", "dtype"),
    [(0, 49, 16, "float32"), (2, 9, 24, "float32"), (1, 9, 528, "float32"), (1, 257, 16, "float32"),
     (1, 9, 16, "float64")],
)  # fmt: skip
def test_what_the_kernel_does_not_serve_goes_to_the_reference(triton_kernels, monkeypatch, number, cells, width, dtype):
    from doublehead.ops.non_local import kernel

    monkeypatch.setattr(kernel, "_launch", None)
    qkv, grad = qkv_and_grad(number, cells, width, getattr(torch, dtype))
    results = run(triton_kernels, qkv, grad, 1, True, 0.1)
    assert results[0].shape == (number, cells, width) and results[1].shape == qkv.shape
    for actual, plain in zip(results, rounded(qkv, grad, 1, True, 0.1), strict=True):
        torch.testing.assert_close(actual.cpu(), plain)


@pytest.mark.parametrize(
    ("cells", "width", "offset", "reason"),
    [
        (9, 24, 0, "a group of inner channels must be a multiple of 16 up to 512 wide"),
        (9, 528, 0, "a group of inner channels must be a multiple of 16 up to 512 wide"),
        (257, 16, 0, "maps of more than 256 cells are not served"),
        (9, 16, 1, "a tensor begins at an address that is no multiple of 16 bytes"),
    ],
)
def test_the_reference_says_why_it_serves(triton_kernels, monkeypatch, cells, width, offset, reason):
    from doublehead.ops.non_local import kernel

    said = []
    monkeypatch.setattr(kernel, "warn_fallback", lambda name, why, device: said.append((name, why)))
    monkeypatch.setattr(kernel, "_launch", None)
    qkv, _ = qkv_and_grad(1, cells, width, torch.float32)
    shifted = torch.empty(qkv.numel() + offset, device=triton_kernels)[offset:].view(qkv.shape).copy_(qkv)
    out = OPERATORS.non_local_attention(shifted, 1, True, 0.1)
    torch.testing.assert_close(out.cpu(), rounded(qkv, qkv[..., :width], 1, True, 0.1)[0])
    assert said == [("non_local_attention", reason)]  # without the call's own numbers: each text is warned of once


def test_the_block_runs_on_the_kernels(triton_kernels, monkeypatch):
    from doublehead.ops.non_local import kernel

    launched = []
    launch = kernel._launch

    def remember(function, *arguments):
        launched.append(function.__name__)
        launch(function, *arguments)

    monkeypatch.setattr(kernel, "_launch", remember)
    x = torch.randn(2, 32, 3, 3, device=triton_kernels, requires_grad=True)
    weights = torch.randn(48, 32, device=triton_kernels), None, torch.randn(32, 16, device=triton_kernels), None
    non_local(x, *weights).sum().backward()
    assert launched == ["forward", "backward_whole"]
