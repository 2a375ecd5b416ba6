"""oneDNN's convolutions, and products made of them, against float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import conv2d, linear

from doublehead.ops import onednn
from tests.support.precision import assert_as_exact

pytestmark = pytest.mark.skipif(not onednn.is_available(), reason="this PyTorch has no oneDNN")


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [None, (2, 12, 9, 7), (3, 12, 5, 5)], ids=["no size", "its size", "another size"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_convolutions_on_packed_weights(kernel, size):
    x = randn(2, 12, 9, 7).contiguous(memory_format=torch.channels_last)
    weight, bias, to = randn(20, 12, kernel, kernel, seed=1), randn(20, seed=2), randn(2, 20, 9, 7, seed=3)
    padding = (kernel // 2,) * 2
    packed = onednn.pack(weight, padding=padding, size=size)

    def expected(dtype, add):
        y = conv2d(x.to(dtype), weight.to(dtype), bias.to(dtype), padding=padding)
        return (y + to.to(dtype) if add else y).relu()

    found = onednn.convolution(x, packed, bias, padding=padding, relu=True)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_as_exact(found, expected(torch.float32, False), expected(torch.float64, False))
    sum_ = to.contiguous(memory_format=torch.channels_last).clone(memory_format=torch.preserve_format)
    assert onednn.add_convolution(sum_, x, packed, bias, padding=padding, relu=True) is sum_
    assert_as_exact(sum_, expected(torch.float32, True), expected(torch.float64, True))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 6, 7, 8, 9, 15, 16, 19, 22])
@pytest.mark.parametrize("columns", [1, 24, 25, 60])
def test_linear(monkeypatch, rows, columns, relu):
    monkeypatch.setattr(onednn, "LINEAR_ROWS", 8)
    monkeypatch.setattr(onednn, "LINEAR_COLUMNS", 24)
    x, weight, bias = randn(rows, columns), randn(20, columns, seed=1), randn(20, seed=2)
    before = x.clone()
    exact = linear(x.double(), weight.double(), bias.double())
    plain = linear(x, weight, bias)
    packed = onednn.pack_linear(weight, bias)
    found = onednn.linear(x, packed, relu)
    assert_as_exact(found, plain.relu() if relu else plain, exact.relu() if relu else exact)
    assert x.equal(before) and found.equal(onednn.linear(x, packed, relu))


def test_linear_at_its_own_block_sizes_and_nan_stays_in_its_row():
    x, weight, bias = randn(onednn.LINEAR_ROWS + 3, 1000), randn(40, 1000, seed=1), randn(40, seed=2)
    x[1, 2] = torch.nan
    x[-1, -1] = torch.inf
    relu = onednn.linear(x, onednn.pack_linear(weight, bias), relu=True)
    found = onednn.linear(x, onednn.pack_linear(weight, bias))
    assert relu[1].isnan().all()  # PyTorch's, which keeps NaN
    rows = [row for row in range(len(x)) if row not in (1, len(x) - 1)]
    assert not found[1].isfinite().any() and not found[-1].isfinite().any()
    exact = linear(x[rows].double(), weight.double(), bias.double())
    assert_as_exact(found[rows], linear(x[rows], weight, bias), exact)


@pytest.mark.parametrize(("rows", "begins", "rest"), [(10, [0], 0), (15, [0], 5), (18, [0, 8], 0), (7, [], 7)])
def test_the_last_rows_make_a_full_block_where_few_are_missing(monkeypatch, rows, begins, rest):
    monkeypatch.setattr(onednn, "LINEAR_ROWS", 10)
    x, weight, bias = randn(rows, 8), randn(4, 8, seed=1), randn(4, seed=2)
    packed, found, plain = onednn.pack_linear(weight, bias), [], []
    add, addmm = onednn.add_convolution, torch.addmm
    monkeypatch.setattr(onednn, "add_convolution", lambda to, x, *a: found.append((x.storage_offset() // 8, x.shape[2]))
                        or add(to, x, *a))  # fmt: skip
    monkeypatch.setattr(torch, "addmm", lambda bias, x, *a, **b: plain.append(len(x)) or addmm(bias, x, *a, **b))
    torch.testing.assert_close(onednn.linear(x, packed), linear(x, weight, bias))
    assert found == [(begin, 10) for begin in begins] and plain == [rest] * (rest > 0)


def test_linear_takes_rows_that_are_not_contiguous(monkeypatch):
    monkeypatch.setattr(onednn, "LINEAR_ROWS", 8)
    weight, bias = randn(20, 30, seed=1), randn(20, seed=2)
    packed = onednn.pack_linear(weight, bias)
    for x in (randn(19, 60)[:, ::2], randn(30, 19).t(), randn(1, 30).expand(19, 30)):
        torch.testing.assert_close(onednn.linear(x, packed), linear(x, weight, bias))


@pytest.mark.parametrize("columns", [slice(None), slice(3, 10)])
@pytest.mark.parametrize("rows", [1, 6])
def test_rows_as_a_map_are_known_to_be_channels_last(rows, columns):
    x = randn(rows, 12)[:, columns]
    found = onednn.as_map(x)
    assert found.shape == (1, x.shape[1], rows, 1) and found.data_ptr() == x.data_ptr()
    # PyTorch tells the format by strides, those of a single column too, and reorders maps whose format it cannot tell.
    assert found.stride()[1:] == (1, 12, x.shape[1])
