"""Winograd's convolution: as exact as the direct one against float64, at any size, however the work is cut."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import conv2d

from doublehead.ops import _library, winograd
from doublehead.ops.winograd import choice, reference
from tests.support.precision import assert_as_exact

OP = torch.ops.doublehead.winograd.default
needs_kernel = pytest.mark.skipif("_C" in _library.UNLOADED, reason="the CPU part is not loaded")
SIZES = [
    (1, 64, 64, 1, 1), (2, 64, 72, 2, 3), (5, 256, 256, 7, 7), (1, 512, 80, 5, 9), (3, 8, 16, 13, 4),
    (1, 13, 21, 6, 10), (1, 70, 130, 31, 17), (2, 33, 5, 4, 4), (1, 128, 64, 1, 40), (1, 3, 1, 40, 1),
]  # fmt: skip


def arguments(number, inputs, outputs, height, width):
    """Maps, weights, bias, residual; maps as after a ReLU."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(number, inputs, height, width, generator=random).relu()
    weight = torch.randn(outputs, inputs, 3, 3, generator=random) * (2 / (9 * inputs)) ** 0.5
    bias = torch.randn(outputs, generator=random)
    residual = torch.randn(number, outputs, height, width, generator=random)
    return [tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight)] + [bias, residual]


def direct(x, weight, bias, residual, relu, dtype):
    y = conv2d(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), padding=1)
    y = y if residual is None else y + residual.to(dtype)
    return y.relu() if relu else y


@needs_kernel
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_float64(size, relu):
    x, weight, bias, residual = arguments(*size)
    bias, residual = (bias, None) if relu else (None, residual)
    before = x.clone()
    found = winograd.convolution(x, winograd.pack(weight), bias, size[2], residual, relu)
    assert found.is_contiguous(memory_format=torch.channels_last)
    plain, exact = (direct(x, weight, bias, residual, relu, dtype) for dtype in (torch.float32, torch.float64))
    # Where nothing is summed the direct convolution is exact, and this one has 36 products.
    assert_as_exact(found, plain, exact, roundings=2 if size[1] >= choice.CHANNELS else 16)
    assert x.equal(before)


@needs_kernel
@pytest.mark.parametrize("channels", [64, 256])
def test_errors_are_the_direct_convolutions(channels):
    """Not the largest alone: their mean square; the usual points 1 and 2, or one long sum, would be above twice."""
    x, weight, bias, _ = arguments(1, channels, channels, 24, 24)
    plain, exact = (direct(x, weight, bias, None, False, dtype) for dtype in (torch.float32, torch.float64))
    found = winograd.convolution(x, winograd.pack(weight), bias, channels)
    errors = [(y.double() - exact).square().mean().sqrt() for y in (found, plain)]
    assert errors[0] <= {64: 2.2, 256: 1}[channels] * errors[1]


def test_the_reference_is_the_convolution():
    for size in SIZES:
        x, weight, bias, residual = (tensor.double() for tensor in arguments(*size))
        packed = reference.pack(weight)
        maps = [tensor.permute(0, 2, 3, 1) for tensor in (x, residual)]
        found = reference.winograd(maps[0], packed, bias, maps[1], size[2], True).permute(0, 3, 1, 2)
        torch.testing.assert_close(
            found, direct(x, weight, bias, residual, True, torch.float64), rtol=1e-11, atol=1e-11
        )


@needs_kernel
def test_threads_and_strips_change_nothing():
    """One map, and the same one among others, which are cut otherwise."""
    x, weight, bias, _ = arguments(3, 64, 64, 45, 38)
    packed = winograd.pack(weight)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(winograd.convolution(x, packed, bias, 64, relu=True))
            found.append(torch.cat([winograd.convolution(part, packed, bias, 64, relu=True) for part in x.split(1)]))
    finally:
        torch.set_num_threads(threads)
    assert all(y.equal(found[0]) for y in found)


@needs_kernel
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_visible_and_in_its_tiles(value):
    x, weight, bias, _ = arguments(2, 64, 64, 12, 12)
    found = [winograd.convolution(x, winograd.pack(weight), bias, 64, relu=True)]
    x[1, 3, 5, 6] = value
    found.append(winograd.convolution(x, winograd.pack(weight), bias, 64, relu=True))
    direct_ = direct(x, weight, bias, None, False, torch.float32)
    assert not found[1][~direct_.isfinite()].isfinite().any()
    assert found[1][0].equal(found[0][0]) and found[1][1, :, :, 8:].equal(found[0][1, :, :, 8:])
    weight[0, 0, 0, 0] = torch.nan
    assert winograd.convolution(x[:1], winograd.pack(weight), bias, 64)[:, 0].isnan().all()


@needs_kernel
def test_operator():
    x, weight, bias, residual = arguments(1, 9, 20, 5, 6)
    maps = [tensor.permute(0, 2, 3, 1).contiguous() for tensor in (x, residual)]
    packed = winograd.pack(weight)
    torch.library.opcheck(OP, (maps[0], packed, bias, maps[1], 20, True))
    assert OP(maps[0][:0], packed, bias, None, 20, True).shape == (0, 5, 6, 20)
    with pytest.raises(RuntimeError, match="no gradient"):
        OP(maps[0].requires_grad_(), packed, None, None, 20, False).sum().backward()


WRONG = {
    "weight": lambda x, w, b: (x, w[:16], b, None, 20, False),
    "outputs": lambda x, w, b: (x, w, None, None, 33, False),
    "no outputs": lambda x, w, b: (x, w, None, None, 0, False),
    "channels": lambda x, w, b: (x[..., :8].contiguous(), w, b, None, 20, False),
    "no channels": lambda x, w, b: (x[..., :0].contiguous(), w[:, :, :0].contiguous(), b, None, 20, False),
    "bias": lambda x, w, b: (x, w, b[:19], None, 20, False),
    "residual": lambda x, w, b: (x, w, b, x.new_zeros(1, 5, 5, 20), 20, False),
    "float64": lambda x, w, b: (x.double(), w, b, None, 20, False),
    "not contiguous": lambda x, w, b: (x.transpose(1, 2), w, b, None, 20, False),
}


@needs_kernel
@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    x, weight, bias, _ = arguments(1, 9, 20, 5, 6)
    with pytest.raises(RuntimeError, match="winograd: "):
        OP(*WRONG[name](x.permute(0, 2, 3, 1).contiguous(), winograd.pack(weight), bias))


def test_where_it_is_used(monkeypatch):
    monkeypatch.setattr(choice, "_is_fast_here", lambda: True)
    wide = (1, 64, 24, 24)
    assert winograd.pays(wide, 64, torch.float32)
    assert not winograd.pays(wide, 32, torch.float32)
    assert not winograd.pays((1, 32, 24, 24), 64, torch.float32)
    assert not winograd.pays((1, 64, 8, 8), 64, torch.float32) and winograd.pays((8, 64, 8, 8), 64, torch.float32)
    assert not winograd.pays(wide, 64, torch.bfloat16) and not winograd.pays(wide, 64, torch.float64)
    monkeypatch.setattr(choice, "_is_fast_here", lambda: False)
    assert not winograd.pays(wide, 64, torch.float32)
