"""Products of 8-bit integers: equal to the definition, which holds the integers in float64, but for ties."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from doublehead.ops import int8
from doublehead.ops.int8 import Grid, grid_of, reference, support
from tests.support.paths import ROOT

needs_products = pytest.mark.skipif(int8.int8_support().level == "none", reason=int8.int8_support().reason)

SIZES = [  # N, I, O, k, H, W
    (3, 16, 32, 3, 7, 7),
    (2, 5, 7, 3, 3, 5),
    (1, 1, 1, 3, 1, 1),
    (1, 33, 19, 1, 13, 1),
    (1, 100, 3, 1, 1, 1),
    (2, 70, 65, 1, 4, 3),
]


def case(size, grid: Grid):
    number, inputs, outputs, kernel, height, width = size
    generator = torch.Generator().manual_seed(sum(size))
    q = torch.randint(0, grid.top + 1, (number, height, width, inputs), generator=generator, dtype=torch.uint8)
    weight = torch.randn(outputs, inputs, kernel, kernel, generator=generator)
    bias, residual = torch.randn(outputs, generator=generator), torch.randn(number, outputs, height, width)
    return q.permute(0, 3, 1, 2), weight, bias, residual.contiguous(memory_format=torch.channels_last)


def definition(q, grid, weight, bias, *args, **kwargs):
    return reference.product(q, grid, *int8.quantize_weight(weight), bias, *args, **kwargs)


def assert_equal_but_for_ties(q, exact, out: Grid):
    """`exact`: the float64 result before it is rounded to the grid `out`."""
    expected = (exact / out.step + out.zero).clamp(0, out.top)
    assert q.dtype == torch.uint8 and int(q.max()) <= out.top
    assert ((q.double() - expected).abs() <= 0.5 + 1e-4).all()


@needs_products
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("signed", [False, True])
def test_products_equal_the_definition(size, signed):
    grid = grid_of(0.02, signed, bits=7)
    q, weight, bias, residual = case(size, grid)
    packed = int8.pack(weight, bias, grid)
    for relu in (False, True):
        expected = definition(q, grid, weight, bias, relu=relu)
        torch.testing.assert_close(int8.product(q, packed, relu).double(), expected, rtol=1e-5, atol=1e-5)
        if size[3] == 1:
            expected = definition(q, grid, weight, bias, residual, relu)
            to = residual.clone(memory_format=torch.preserve_format)
            added = int8.add_product(to, q, int8.pack(weight, bias, grid, added=True), relu)
            torch.testing.assert_close(added.double(), expected, rtol=1e-5, atol=1e-5)
            assert added.data_ptr() == to.data_ptr()
    exact = definition(q, grid, weight, bias, relu=True)
    for bits in (7, 8):
        out = grid_of(float(exact.max()) / 200 + 1e-3, False, bits)  # some are clipped in neither
        assert_equal_but_for_ties(int8.product(q, packed, True, out), exact, out)
        out = grid_of(float(exact.max()) / 600 + 1e-3, False, bits)  # many are in both
        assert_equal_but_for_ties(int8.product(q, packed, True, out), exact, out)


@needs_products
@pytest.mark.parametrize("kernel", [1, 3])
def test_the_largest_sums_of_seven_bits_are_exact(kernel):
    for signed in (False, True):
        assert support._largest_sums(kernel, grid_of(1.0, signed, 7))


@needs_products
def test_the_largest_sums_tell_whether_eight_bits_are_exact():
    assert support._is_exact(8) == (int8.int8_support().level == "vnni")


@needs_products
def test_the_same_twice():
    grid = grid_of(0.02, True, 7)
    q, weight, bias, _ = case((5, 64, 64, 3, 7, 7), grid)
    packed = int8.pack(weight, bias, grid)
    assert int8.product(q, packed).equal(int8.product(q, packed))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [7, 8])
def test_quantize_rounds_to_the_nearest_and_clips(signed, bits):
    grid = grid_of(0.5, signed, bits)
    x = torch.cat((torch.arange(-400, 400) * (grid.step / 4), torch.tensor([1e6, -1e6, 0.0])))
    assert int8.quantize(x, grid).equal(reference.quantize(x, grid))
    x = torch.randn(3, 5, 4) if signed else torch.rand(3, 5, 4)
    assert int8.quantize(x.mT, grid).equal(reference.quantize(x.mT, grid))
    assert int8.quantize(x[:0], grid).shape == (0, 5, 4)
    assert (reference.dequantize(int8.quantize(x, grid), grid) - x).abs().max() <= grid.step / 2 + 1e-6


def test_seven_bits_reach_as_far_as_eight():
    eight, seven = grid_of(0.1, False, 8), grid_of(0.1, False, 7)
    assert (eight.top * eight.step, seven.top * seven.step) == pytest.approx((25.5, 25.4))
    assert grid_of(0.1, True, 8) == Grid(0.1, 128, 255) and grid_of(0.1, True, 7) == Grid(0.2, 64, 127)


def test_weights_have_a_scale_for_each_channel():
    weight = torch.randn(4, 3, 3, 3) * torch.tensor([1.0, 1e-3, 0.0, 50.0]).view(-1, 1, 1, 1)
    q, scales = int8.quantize_weight(weight)
    assert q.dtype == torch.int8 and int(q.min()) >= -127 and scales[2] == 1
    error = (q.float() * scales.view(-1, 1, 1, 1) - weight).abs().amax((1, 2, 3))
    assert (error <= scales * 0.5001).all() and (q[[0, 1, 3]].flatten(1).abs().amax(1) == 127).all()


@pytest.fixture
def asked_anew():
    int8.int8_support.cache_clear()
    yield
    int8.int8_support.cache_clear()


@pytest.mark.parametrize(
    ("change", "level", "reason"),
    [
        ({"machine": "aarch64"}, "none", "8-bit products are for x86 processors, this one is aarch64"),
        ({"_has_operators": False}, "none", f"PyTorch {torch.__version__} has no 8-bit products of oneDNN"),
        ({"_has_vnni": True, "_is_exact": True}, "vnni", ""),
        ({"_has_vnni": True, "_is_exact": 7}, "seven_bits", "oneDNN does not use the processor's VNNI"),
        ({"_has_vnni": False, "_is_exact": 7}, "seven_bits", "the processor has no VNNI"),
        ({"_has_vnni": False, "_is_exact": True}, "seven_bits", "the processor has no VNNI"),
        ({"_has_vnni": False, "_is_exact": False}, "none", "oneDNN's 8-bit products are not exact"),
    ],
)
def test_support(monkeypatch, asked_anew, change, level, reason):
    monkeypatch.setattr(platform, "machine", lambda: change.get("machine", "x86_64"))
    monkeypatch.setattr(support, "_has_operators", lambda: change.get("_has_operators", True))
    monkeypatch.setattr(support, "_has_vnni", lambda: change.get("_has_vnni", False))
    exact = change.get("_is_exact", True)
    monkeypatch.setattr(support, "_is_exact", lambda bits: bits == 7 if exact == 7 else exact)
    found = int8.int8_support()
    assert found.level == level and found.reason.startswith(reason)
    assert found.bits == {"vnni": 8, "seven_bits": 7, "none": 0}[level]


QUIET = """
import warnings, torch
from doublehead.ops import int8
warnings.simplefilter("error")
assert int8.int8_support().level in ("vnni", "seven_bits", "none")
int8.quantize(torch.ones(3), int8.Grid(1.0, 0, 255))
"""


def test_a_user_is_not_warned_of_what_pytorch_will_give_up(monkeypatch):
    subprocess.run([sys.executable, "-c", QUIET], cwd=ROOT, check=True, timeout=120)
    monkeypatch.delattr(torch, "quantize_per_tensor")
    assert not support._has_operators()
