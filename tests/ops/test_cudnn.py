"""cuDNN's fused convolutions: when they are called, and what stands in for them; test_cudnn_gpu.py has the kernels."""

import warnings

import pytest
import torch
from torch.nn.functional import conv2d

from doublehead.ops import _fallback, cudnn
from tests.support.cudnn_standin import LAST, cuda_on_cpu
from tests.support.precision import assert_as_exact

CUDA, HALF = torch.device("cuda"), (torch.float16, torch.bfloat16)


@pytest.fixture
def built(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)


def tensors(dtype=torch.bfloat16, inputs=16, outputs=24, kernel=3, size=(2, 9, 11)):
    random = torch.Generator().manual_seed(0)
    batch, height, width = size
    shapes = (batch, inputs, height, width), (outputs, inputs, kernel, kernel), (batch, outputs, height, width)
    x, weight, to = (torch.randn(shape, generator=random).to(dtype, memory_format=LAST) for shape in shapes)
    return x, weight, torch.randn(outputs, generator=random).to(dtype), to


def test_where_they_are_there(built):
    assert all(cudnn.is_available(CUDA, dtype) for dtype in (*HALF, torch.float32))
    assert not cudnn.is_available(CUDA, torch.float64) and not cudnn.is_available(torch.device("cpu"), HALF[0])
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    conv.fp32_precision = "ieee"
    try:
        assert not cudnn.is_available(CUDA, torch.float32) and cudnn.is_available(CUDA, HALF[0])
    finally:
        conv.fp32_precision = before


@pytest.mark.parametrize("switch", ["deterministic", "deterministic algorithms", "disabled", "not built", "AMD"])
def test_where_they_are_not(built, monkeypatch, switch):
    match switch:
        case "deterministic":
            monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
        case "deterministic algorithms":
            monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        case "disabled":
            monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
        case "not built":
            monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
        case "AMD":
            monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not cudnn.is_available(CUDA, HALF[0])


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("kernel, stride", [(1, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("fused", [False, True])
def test_results(dtype, kernel, stride, fused):
    x, weight, bias, to = tensors(dtype, kernel=kernel)
    to = to[:, :, ::stride, ::stride].contiguous(memory_format=LAST)
    before = to.clone()
    options = {"stride": (stride, stride), "padding": (kernel // 2, kernel // 2)}
    wide = conv2d(x.double(), weight.double(), bias.double(), **options)
    plain = conv2d(x, weight, bias, **options)
    with cuda_on_cpu() if fused else warnings.catch_warnings():
        assert cudnn.serves(x, weight, bias) is fused
        for relu in (False, True):
            found = cudnn.convolution(x, weight, bias, relu=relu, **options)
            assert_as_exact(found, plain.relu() if relu else plain, wide.relu() if relu else wide)
            found = cudnn.add_convolution(to, x, weight, bias, relu=relu, **options)
            plain_sum, exact = plain + to, wide + to.double()
            assert_as_exact(found, plain_sum.relu() if relu else plain_sum, exact.relu() if relu else exact)
            assert torch.equal(to, before) and found.is_contiguous(memory_format=LAST)


def test_calls_that_are_not_served():
    with cuda_on_cpu():
        assert cudnn.serves(*tensors()[:3])
        assert not cudnn.serves(*tensors(inputs=12)[:3]) and not cudnn.serves(*tensors(outputs=12)[:3])
        assert cudnn.serves(*tensors(torch.float32, inputs=12)[:3])
        x, weight, bias, _ = tensors()
        assert not cudnn.serves(x, weight, None) and not cudnn.serves(x[:0], weight, bias)
        assert not cudnn.serves(x[:1].expand(2**21, -1, -1, -1), weight, bias)
        assert cudnn.convolution(x[:0], weight, bias, padding=(1, 1), relu=True).shape == (0, 24, 9, 11)
        x, weight, bias, _ = tensors(outputs=16)
        found = cudnn.add_convolution(x, x, weight, bias, (1, 1), (1, 1), relu=True)  # the stand-in asserts
        torch.testing.assert_close(found, (conv2d(x, weight, bias, 1, 1) + x).relu())


@pytest.mark.parametrize("message", [
    "GET was unable to find an engine to execute this computation",
    "CUDNN_BACKEND_OPERATION: cudnnFinalize Failed cudnn_status: CUDNN_STATUS_BAD_PARAM",
    "another",
])  # fmt: skip
def test_without_a_kernel_for_a_call(monkeypatch, message):
    """PyTorch raises; the call, and others like it, run in plain PyTorch, which is said once."""
    calls = []

    def refuse(*_):
        calls.append(1)
        raise RuntimeError(message)

    x, weight, bias, to = tensors()
    monkeypatch.setattr(cudnn, "_UNSERVED", set())
    monkeypatch.setattr(_fallback, "_WARNED", set())
    with cuda_on_cpu(), torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("cudnn_convolution_relu", refuse, "CPU", allow_override=True)
        if message == "another":
            with pytest.raises(RuntimeError, match="another"):
                cudnn.convolution(x, weight, bias, relu=True)
            return
        with pytest.warns(RuntimeWarning, match="cuDNN has no kernel for these shapes"):
            found = cudnn.convolution(x, weight, bias, relu=True)
        torch.testing.assert_close(found, conv2d(x, weight, bias).relu())
        cudnn.convolution(x, weight, bias, relu=True)
        assert len(calls) == 1
        cudnn.convolution(x, weight, bias, (2, 2), relu=True)
        cudnn.convolution(x[:1], weight, bias, relu=True)
        assert len(calls) == 3
        assert cudnn.add_convolution(to, x, weight, bias, (1, 1), (1, 1), relu=True).shape == to.shape
