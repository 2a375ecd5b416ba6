"""cuDNN's fused convolutions on a CUDA device: PyTorch's results, whatever the new memory held."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import conv2d

from doublehead.ops import cudnn
from tests.support.precision import assert_as_exact, convolution_eps

LAST = torch.channels_last
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.backends.cudnn.is_available(), reason="this PyTorch has no cuDNN"),
]


@pytest.fixture(autouse=True)
def none_without_a_kernel(monkeypatch):
    monkeypatch.setattr(cudnn, "_UNSERVED", set())
    yield
    assert not cudnn._UNSERVED


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "inputs, outputs, kernel, stride, size",
    [(16, 64, 4, 1, (65, 97)), (8, 64, 7, 2, (64, 96)), (64, 256, 1, 1, (50, 84)), (256, 256, 3, 1, (25, 42)),
     (128, 128, 3, 2, (51, 83)), (24, 40, 3, 1, (7, 7)), (16, 8, 1, 2, (9, 11))],
)  # fmt: skip
@torch.no_grad()
def test_results(dtype, inputs, outputs, kernel, stride, size):
    random = torch.Generator().manual_seed(0)
    options = {"stride": (stride,) * 2, "padding": ((kernel - 1) // 2,) * 2}

    def tensor(*shape, spread=1.0):
        x = spread * torch.randn(shape, generator=random)
        return x.to("cuda", dtype, memory_format=LAST if len(shape) == 4 else torch.preserve_format)

    x, bias = tensor(2, inputs, *size), tensor(outputs)
    weight = tensor(outputs, inputs, kernel, kernel, spread=inputs**-0.5 / kernel)
    assert cudnn.serves(x, weight, bias)
    plain, exact = (conv2d(*(t.to(kind) for t in (x, weight, bias)), **options) for kind in (dtype, torch.float64))
    to = tensor(*plain.shape)
    eps = convolution_eps("cuda", dtype)
    for _ in range(3):  # the allocator gives out memory that was freed: here full of NaN
        torch.full_like(to, torch.nan)
        found = cudnn.convolution(x, weight, bias, relu=True, **options)
        assert_as_exact(found, plain.relu(), exact.relu(), eps=eps)
        assert found.is_contiguous(memory_format=LAST)
    before = to.clone()
    found = cudnn.add_convolution(to, x, weight, bias, relu=True, **options)
    assert_as_exact(found, (plain + to).relu(), (exact + to.double()).relu(), eps=eps)
    assert to.equal(before)


@torch.no_grad()
def test_in_a_graph():
    """Recorded and replayed on other values, in the same memory."""
    x = torch.randn(1, 64, 20, 20, device="cuda").bfloat16().to(memory_format=LAST)
    weight = torch.randn(64, 64, 3, 3, device="cuda").bfloat16().to(memory_format=LAST)
    bias = torch.zeros(64, device="cuda", dtype=torch.bfloat16)

    def run():
        return cudnn.add_convolution(cudnn.convolution(x, weight, bias, relu=True), x[:, :, 1:-1, 1:-1].contiguous(
            memory_format=LAST), weight, bias, padding=(1, 1), relu=True)  # fmt: skip

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, run())
