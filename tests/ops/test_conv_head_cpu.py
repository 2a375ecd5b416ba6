"""The conv-head on the CPU, in oneDNN's convolutions and in matrix products, against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import conv2d

from doublehead.ops import conv_head, onednn, winograd
from doublehead.ops.conv_head import Block, cpu
from doublehead.ops.conv_head import reference as definition
from doublehead.ops.conv_head.arguments import pack
from doublehead.ops.winograd import choice
from tests.support.precision import assert_as_exact

needs_onednn = pytest.mark.skipif(not onednn.is_available(), reason="this PyTorch has no oneDNN")
HEADS = {
    "widening": [Block.WIDENING],
    "all": [Block.WIDENING, Block.NON_LOCAL, Block.BOTTLENECK, Block.NON_LOCAL, Block.BOTTLENECK],
    "shortcut with ReLU": [Block.WIDENING_SHORTCUT_RELU, Block.BOTTLENECK],
    "attention last": [Block.WIDENING, Block.NON_LOCAL],
}


def head(name: str, number: int, size=(7, 7), channels: int = 24, dim: int = 48, inner: int = 32):
    """Maps and weights in float32."""
    shapes = {
        Block.WIDENING: [(channels, channels, 3, 3), (dim, 2 * channels)],
        Block.WIDENING_SHORTCUT_RELU: [(channels, channels, 3, 3), (dim, channels), (dim, channels)],
        Block.NON_LOCAL: [(3 * inner, dim), (dim, inner)],
        Block.BOTTLENECK: [(12, dim), (12, 12, 3, 3), (dim, 12)],
    }
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for shape in (shape for block in HEADS[name] for shape in shapes[block]):
        fan_in = torch.Size(shape[1:]).numel()
        tensors += [torch.randn(shape, generator=generator) / fan_in**0.5, torch.randn(shape[0], generator=generator)]
    x = torch.randn(number, channels, *size, generator=generator)
    return x.contiguous(memory_format=torch.channels_last), tensors


def attention(softmax: bool = True, relu: bool = True, groups: int = 2):
    return {"groups": groups, "softmax": softmax, "scale": 0.1, "relu": relu}


def defined(x, tensors, name, dtype, options, count=None):
    weights = [tensor.to(dtype) for tensor in tensors]
    return definition.conv_head(*pack(x.to(dtype), weights, HEADS[name], count, *options.values()))


@pytest.fixture(params=["oneDNN", "products"])
def path(request, monkeypatch):
    """Which path runs; a few maps at a time."""
    if request.param == "oneDNN" and not onednn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(cpu, "CELLS", 4 * 49 + 1)
    monkeypatch.setattr(cpu, "FEW", 0)
    monkeypatch.setattr(onednn, "is_available", lambda dtype: request.param == "oneDNN")
    return request.param


@pytest.mark.usefixtures("path", "poisoned")
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("number", [0, 1, 4, 5, 8, 11])  # 4 maps at a time
def test_any_number_of_maps(name, number):
    x, tensors = head(name, number)
    before, options = x.clone(), attention(softmax=number % 2 == 0, relu=number != 5, groups=1 + number % 2)
    found = conv_head(x, tensors, HEADS[name], **options)
    expected = [defined(x, tensors, name, dtype, options) for dtype in (torch.float32, torch.float64)]
    assert_as_exact(found, *expected, roundings=8)
    assert x.equal(before) and found.equal(conv_head(x, tensors, HEADS[name], **options))


@needs_onednn
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("number", [8, 31])  # one chunk, and several with a part of one
def test_winograds_method(monkeypatch, number):
    monkeypatch.setattr(cpu, "CELLS", 8 * 49)
    monkeypatch.setattr(choice, "_is_fast_here", lambda: True)
    called, original = [], winograd.convolution
    monkeypatch.setattr(winograd, "convolution", lambda *a, **k: called.append(len(a[0])) or original(*a, **k))
    x, tensors = head("all", number, channels=64)
    expected = [defined(x, tensors, "all", dtype, attention()) for dtype in (torch.float32, torch.float64)]
    assert_as_exact(conv_head(x, tensors, HEADS["all"], **attention()), *expected, roundings=8)
    assert called == ([] if number == 8 else [8, 8, 8, 7])  # the bottlenecks have few channels


@pytest.mark.usefixtures("path", "poisoned")
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 3), (2, 14), (15, 15)])
def test_any_size_of_maps(size):
    x, tensors = head("all", 9, size)
    expected = [defined(x, tensors, "all", dtype, attention()) for dtype in (torch.float32, torch.float64)]
    assert_as_exact(conv_head(x, tensors, HEADS["all"], **attention()), *expected, roundings=8)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("channels", [(1, 2, 2), (3, 10, 6), (17, 33, 20)])
def test_any_number_of_channels(channels):
    x, tensors = head("all", 9, (7, 7), *channels)
    expected = [defined(x, tensors, "all", dtype, attention()) for dtype in (torch.float32, torch.float64)]
    assert_as_exact(conv_head(x, tensors, HEADS["all"], **attention()), *expected, roundings=8)


@pytest.mark.usefixtures("path", "poisoned")
@pytest.mark.parametrize("count", [-1, 0, 1, 4, 7, 11, 20])
def test_maps_behind_the_count_are_not_read(count):
    x, tensors = head("all", 11)
    exact = defined(x, tensors, "all", torch.float64, attention())
    plain = defined(x, tensors, "all", torch.float32, attention())
    kept = max(min(count, 11), 0)
    x[kept:] = torch.nan
    found = conv_head(x, tensors, HEADS["all"], torch.tensor(count), **attention())
    assert_as_exact(found[:kept], plain[:kept], exact[:kept], roundings=8)
    assert (found[kept:] == 0).all()


@pytest.mark.usefixtures("path")
def test_nan_stays_in_its_row():
    x, tensors = head("all", 11)
    exact = defined(x, tensors, "all", torch.float64, attention())
    plain = defined(x, tensors, "all", torch.float32, attention())
    x[2, 5, 3, 3] = torch.nan
    x[10, 0, 0, 0] = torch.nan
    found = conv_head(x, tensors, HEADS["all"], **attention())
    clean = [row for row in range(11) if row not in (2, 10)]
    assert found[[2, 10]].isnan().all()
    assert_as_exact(found[clean], plain[clean], exact[clean], roundings=8)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(
    "of",
    [
        lambda x: x.contiguous(),
        lambda x: torch.cat((x, x), dim=1).contiguous(memory_format=torch.channels_last)[:, : x.shape[1]],
        lambda x: x.repeat_interleave(2, dim=0)[::2],
        lambda x: x.flip(3).contiguous(memory_format=torch.channels_last).flip(3),
        lambda x: x[:1].expand(len(x), -1, -1, -1),
    ],
    ids=["NCHW", "half of the channels", "every second map", "flipped", "one map expanded"],
)
def test_maps_that_are_not_channels_last(of):
    x, tensors = head("all", 9)
    x = of(x)
    before = x.clone()
    exact, plain = (defined(x, tensors, "all", dtype, attention()) for dtype in (torch.float64, torch.float32))
    assert_as_exact(conv_head(x, tensors, HEADS["all"], **attention()), plain, exact, roundings=8)
    assert x.equal(before)


@needs_onednn
def test_results_do_not_depend_on_the_chunk(monkeypatch):
    x, tensors = head("all", 11)
    exact = defined(x, tensors, "all", torch.float64, attention())
    plain = defined(x, tensors, "all", torch.float32, attention())
    monkeypatch.setattr(cpu, "FEW", 0)
    for cells in (1, 2 * 49, 5 * 49, 11 * 49, 1000 * 49):
        monkeypatch.setattr(cpu, "CELLS", cells)
        assert_as_exact(conv_head(x, tensors, HEADS["all"], **attention()), plain, exact, f"{cells}", roundings=8)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("index", range(14))
def test_a_broken_weight_is_seen(index, value):
    x, tensors = head("all", 5)
    tensors[index].view(-1)[0] = value
    expected = defined(x, tensors, "all", torch.float32, attention())
    torch.testing.assert_close(conv_head(x, tensors, HEADS["all"], **attention()), expected, equal_nan=True)


def test_which_path_serves_what(monkeypatch):
    called = []
    for name in ("FusedBlocks", "PlainBlocks"):
        path = getattr(cpu, name)
        call = path.__call__
        monkeypatch.setattr(
            path, "__call__", lambda *arguments, name=name, call=call: called.append(name) or call(*arguments)
        )
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16):
        x, tensors = head("widening", 6)
        conv_head(x.to(dtype), [tensor.to(dtype) for tensor in tensors], HEADS["widening"])
    served = [onednn.is_available(dtype) for dtype in (torch.float32, torch.bfloat16)] + [False, False]
    assert called == ["FusedBlocks" if fused else "PlainBlocks" for fused in served]
    x, tensors = head("widening", 32 + 5)
    called.clear()
    conv_head(x, tensors, HEADS["widening"])
    assert called == ["FusedBlocks" if onednn.is_available() else "PlainBlocks", "PlainBlocks"]  # 5 are few


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("softmax", [False, True])
def test_data_flow_in_bfloat16(monkeypatch, name, softmax):
    """oneDNN's functions need AVX-512 in bfloat16: plain convolutions stand in for them."""

    def convolution(x, weight, bias, stride=(1, 1), padding=(0, 0), relu=False):
        assert x.dtype == weight.dtype == bias.dtype == torch.bfloat16
        y = conv2d(x.float(), weight.float(), bias.float(), stride, padding)
        return (y.relu() if relu else y).bfloat16().contiguous(memory_format=torch.channels_last)

    def add_convolution(to, x, weight, bias, stride=(1, 1), padding=(0, 0), relu=False):
        y = to.float() + conv2d(x.float(), weight.float(), bias.float(), stride, padding)
        return to.copy_(y.relu() if relu else y)

    monkeypatch.setattr(onednn, "is_available", lambda dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(onednn, "pack", lambda weight, **options: weight)
    monkeypatch.setattr(onednn, "convolution", convolution)
    monkeypatch.setattr(onednn, "add_convolution", add_convolution)
    monkeypatch.setattr(cpu, "CELLS", 2 * 15)
    monkeypatch.setattr(cpu, "FEW", 0)
    x, tensors = head(name, 5, (5, 3))
    x, tensors = x.bfloat16(), [tensor.bfloat16() for tensor in tensors]
    expected = [defined(x, tensors, name, dtype, attention(softmax)) for dtype in (torch.bfloat16, torch.float64)]
    assert_as_exact(conv_head(x, tensors, HEADS[name], **attention(softmax)), *expected)
