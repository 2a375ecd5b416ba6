"""Batch normalisation with residual and ReLU in Triton: sums over rows in two steps, then one pass that applies them.

Rows are split into a fixed number of parts. Each program sums one part of a block of channels, every row of its tile by
itself until the end; a second, tiny kernel joins the parts, all at once. Both sum by a fixed tree, so results depend on
shapes alone, not on scheduling. Means and sums of squared deviations are never the difference of large numbers: within
a row of the tile by Welford's rule, between rows and parts by that of Chan et al. (1979).

A join by the last program to finish would spare its launch, but needs a counter that is zero: a launch of its own.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import Launcher, blocks, kind_of
from . import reference
from .arguments import ApplyArguments, BackwardArguments, ForwardArguments

ROWS, CHANNELS = 32, 64  # a tile of the sums: 128-byte lines of 16-bit values
JOIN_CHANNELS = 32
APPLY_ROWS, APPLY_CHANNELS = 16, 128
MOST_PARTS = 128
WARPS = 4
_ROWS = ("rows", "part_rows", "parts")  # numbers that change from batch to batch: no kernel is compiled for each


@triton.jit(do_not_specialize=_ROWS)
def statistics_kernel(x, sums, rows, channels, part_rows, parts, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Mean, less the first row, and squared deviations of one part of the rows, for a block of channels.

    `sums`: `[2, parts, channels]`.
    """
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    part = tl.program_id(1)
    begin = part * part_rows
    end = tl.minimum(begin + part_rows, rows)
    count = 0.0
    mean = tl.zeros((ROWS, CHANNELS), tl.float32)
    square = tl.zeros((ROWS, CHANNELS), tl.float32)
    # Means of what is left of large values without the first row's are small, and so are their rounding errors.
    pivot = tl.load(x + channel, mask=channel < channels, other=0.0).to(tl.float32)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & (channel < channels)[None, :]
        tile = tl.load(x + row.to(tl.int64)[:, None] * channels + channel[None, :], mask=inside, other=0.0)
        tile = tile.to(tl.float32) - pivot[None, :]
        count += 1.0
        step = tl.where(inside, tile - mean, 0.0)
        mean += step * (1.0 / count)
        square += step * (tile - mean)
    # How many rows each row of the tile has seen: the last tile may be cut off.
    seen = ((end - begin - tl.arange(0, ROWS) + ROWS - 1) // ROWS).to(tl.float32)[:, None]
    total = tl.sum(mean * seen, 0) / (end - begin).to(tl.float32)
    off = mean - total[None, :]
    at = part.to(tl.int64) * channels + channel
    tl.store(sums + at, total, mask=channel < channels)
    tl.store(sums + parts.to(tl.int64) * channels + at, tl.sum(square + off * off * seen, 0), mask=channel < channels)


@triton.jit(do_not_specialize=_ROWS)
def join_statistics_kernel(
    x, sums, mean_out, invstd_out, rows, channels, part_rows, parts, eps, CHANNELS: tl.constexpr, PARTS: tl.constexpr
):
    """All parts of a block of channels together."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    part = tl.arange(0, PARTS)
    inside = (part < parts)[:, None] & (channel < channels)[None, :]
    at = sums + part[:, None] * channels + channel[None, :]
    means = tl.load(at, mask=inside, other=0.0)
    squares = tl.load(at + parts * channels, mask=inside, other=0.0)
    count = tl.where(part < parts, tl.minimum(rows - part * part_rows, part_rows), 0).to(tl.float32)[:, None]
    mean = tl.sum(means * count, 0) / rows
    off = means - mean[None, :]
    square = tl.sum(squares + off * off * count, 0)
    mean += tl.load(x + channel, mask=channel < channels, other=0.0).to(tl.float32)
    tl.store(mean_out + channel, mean, mask=channel < channels)
    tl.store(invstd_out + channel, 1.0 / tl.sqrt_rn(square / rows + eps), mask=channel < channels)


@triton.jit(do_not_specialize=_ROWS)
def apply_kernel(
    x, residual, mean, invstd, weight, bias, y, rows, channels,
    RESIDUAL: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (row < rows)[:, None] & (channel < channels)[None, :]
    at = row.to(tl.int64)[:, None] * channels + channel[None, :]
    scale = tl.load(invstd + channel, mask=channel < channels, other=0.0)
    scale *= tl.load(weight + channel, mask=channel < channels, other=0.0).to(tl.float32)
    centre = tl.load(mean + channel, mask=channel < channels, other=0.0)
    shift = tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)
    value = (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - centre[None, :]) * scale[None, :] + shift[None, :]
    if RESIDUAL:
        value += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    if RELU:  # NaN stays NaN, as torch.relu has it
        value = tl.where(value < 0, 0.0, value)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_ROWS)
def gradient_sums_kernel(
    grad, x, y, mean, sums, rows, channels, part_rows, parts,
    RELU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums of the gradient, and of gradient times x less its mean, over one part of the rows.

    `sums`: `[2, parts, channels]`.
    """
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    part = tl.program_id(1)
    begin = part * part_rows
    end = tl.minimum(begin + part_rows, rows)
    centre = tl.load(mean + channel, mask=channel < channels, other=0.0)
    of_weight = tl.zeros((ROWS, CHANNELS), tl.float32)
    of_bias = tl.zeros((ROWS, CHANNELS), tl.float32)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & (channel < channels)[None, :]
        at = row.to(tl.int64)[:, None] * channels + channel[None, :]
        slope = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        if RELU:
            slope = tl.where(tl.load(y + at, mask=inside, other=0.0) > 0, slope, 0.0)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        of_bias += slope
        of_weight += slope * (value - centre[None, :])
    at = part.to(tl.int64) * channels + channel
    tl.store(sums + at, tl.sum(of_bias, 0), mask=channel < channels)
    tl.store(sums + parts.to(tl.int64) * channels + at, tl.sum(of_weight, 0), mask=channel < channels)


@triton.jit(do_not_specialize=_ROWS)
def join_gradients_kernel(
    sums, invstd, grad_weight, grad_bias, channels, parts, CHANNELS: tl.constexpr, PARTS: tl.constexpr
):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    part = tl.arange(0, PARTS)
    inside = (part < parts)[:, None] & (channel < channels)[None, :]
    at = sums + part[:, None] * channels + channel[None, :]
    of_bias = tl.sum(tl.load(at, mask=inside, other=0.0), 0)
    of_weight = tl.sum(tl.load(at + parts * channels, mask=inside, other=0.0), 0)
    scale = tl.load(invstd + channel, mask=channel < channels, other=0.0)
    tl.store(grad_weight + channel, of_weight * scale, mask=channel < channels)
    tl.store(grad_bias + channel, of_bias, mask=channel < channels)


@triton.jit(do_not_specialize=_ROWS)
def gradient_kernel(
    grad, x, y, mean, invstd, weight, grad_weight, grad_bias, grad_x, grad_residual, rows, channels,
    RELU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    of_channel = channel < channels
    inside = (row < rows)[:, None] & of_channel[None, :]
    at = row.to(tl.int64)[:, None] * channels + channel[None, :]
    centre = tl.load(mean + channel, mask=of_channel, other=0.0)
    scale = tl.load(invstd + channel, mask=of_channel, other=0.0)
    factor = scale * tl.load(weight + channel, mask=of_channel, other=0.0).to(tl.float32)
    # What all rows share, divided here and not once an element.
    common = tl.load(grad_bias + channel, mask=of_channel, other=0.0) / rows
    along = tl.load(grad_weight + channel, mask=of_channel, other=0.0) * scale / rows
    slope = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        slope = tl.where(tl.load(y + at, mask=inside, other=0.0) > 0, slope, 0.0)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - centre[None, :]
    of_x = (slope - common[None, :] - value * along[None, :]) * factor[None, :]
    tl.store(grad_x + at, of_x.to(grad_x.dtype.element_ty), mask=inside)
    if grad_residual is not None:
        tl.store(grad_residual + at, slope.to(grad_residual.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------------------------------------
# Launchers: the operators' arguments, in order

_SUMS = {"ROWS": ROWS, "CHANNELS": CHANNELS, "num_warps": WARPS}
_JOIN = {"CHANNELS": JOIN_CHANNELS, "PARTS": MOST_PARTS, "num_warps": WARPS}
_APPLY = {"ROWS": APPLY_ROWS, "CHANNELS": APPLY_CHANNELS, "num_warps": WARPS}
_EITHER = False, True
_statistics = Launcher(statistics_kernel, **_SUMS)
_join_statistics = Launcher(join_statistics_kernel, **_JOIN)
_apply = {(r, a): Launcher(apply_kernel, RESIDUAL=r, RELU=a, **_APPLY) for r in _EITHER for a in _EITHER}
_gradient_sums = {a: Launcher(gradient_sums_kernel, RELU=a, **_SUMS) for a in _EITHER}
_join_gradients = Launcher(join_gradients_kernel, **_JOIN)
_gradient = {a: Launcher(gradient_kernel, RELU=a, **_APPLY) for a in _EITHER}


def _kind(*tensors: Tensor | None) -> tuple | None:
    """What the launches of one operator are specialised on; tensors of its own are aligned, and always alike."""
    kind, shape = kind_of(*tensors), tensors[0].shape
    return None if kind is None or shape[0] >= 2**31 else (*kind, shape[1])


def parts_of(rows: int) -> tuple[int, int]:
    """How many parts the rows are split into, and the rows of each (the last may have fewer)."""
    part_rows = blocks(blocks(rows, MOST_PARTS), ROWS) * ROWS
    return blocks(rows, part_rows), part_rows


class Grids(NamedTuple):
    """The blocks of each kernel."""

    parts: int
    part_rows: int
    sums: tuple[int, int, int]
    join: tuple[int, int, int]
    apply: tuple[int, int, int]


@functools.lru_cache(maxsize=256)
def grids_of(rows: int, channels: int) -> Grids:
    parts, part_rows = parts_of(rows)
    apply = blocks(rows, APPLY_ROWS), blocks(channels, APPLY_CHANNELS), 1
    return Grids(
        parts, part_rows, (blocks(channels, CHANNELS), parts, 1), (blocks(channels, JOIN_CHANNELS), 1, 1), apply
    )  # fmt: skip


def batch_norm_act(args: ForwardArguments) -> tuple[Tensor, Tensor, Tensor]:
    if args.x.dtype == torch.float64:
        return reference.batch_norm_act(args)
    x, residual = args.x.contiguous(), None if args.residual is None else args.residual.contiguous()
    rows, channels = x.shape
    parts, part_rows, sums_grid, join_grid, apply_grid = grids_of(rows, channels)
    kind = _kind(x, args.weight, args.bias, residual)
    sums = x.new_empty((2, parts, channels), dtype=torch.float32)
    mean = x.new_empty(channels, dtype=torch.float32)
    invstd, y = torch.empty_like(mean), torch.empty_like(x)
    _statistics(kind, sums_grid, x, sums, rows, channels, part_rows, parts)
    _join_statistics(
        kind, join_grid, x, sums, mean, invstd, rows, channels, part_rows, parts, args.eps,
    )  # fmt: skip
    _apply[residual is not None, args.relu](
        kind, apply_grid, x, residual, mean, invstd, args.weight, args.bias, y, rows, channels
    )
    return y, mean, invstd


def batch_norm_act_apply(args: ApplyArguments) -> Tensor:
    if args.x.dtype == torch.float64:
        return reference.batch_norm_act_apply(args)
    x, mean, invstd, weight, bias = args.x.contiguous(), args.mean, args.invstd, args.weight, args.bias
    residual = None if args.residual is None else args.residual.contiguous()
    y = torch.empty_like(x)
    _apply[residual is not None, args.relu](
        _kind(x, mean, invstd, weight, bias, residual), grids_of(*x.shape).apply,
        x, residual, mean, invstd, weight, bias, y, *x.shape,
    )  # fmt: skip
    return y


def batch_norm_act_backward(args: BackwardArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if args.x.dtype == torch.float64:
        return reference.batch_norm_act_backward(args)
    x, y, grad = args.x.contiguous(), args.y, args.grad.contiguous()
    mean, invstd, weight = args.mean, args.invstd, args.weight
    rows, channels = x.shape
    parts, part_rows, sums_grid, join_grid, apply_grid = grids_of(rows, channels)
    kind = _kind(x, y, grad, mean, invstd, weight)
    sums = x.new_empty((2, parts, channels), dtype=torch.float32)
    grad_weight, grad_bias = torch.empty_like(mean), torch.empty_like(mean)
    grad_x, grad_residual = torch.empty_like(x), torch.empty_like(x) if args.residual else None
    _gradient_sums[y is not None](kind, sums_grid, grad, x, y, mean, sums, rows, channels, part_rows, parts)
    _join_gradients(kind, join_grid, sums, invstd, grad_weight, grad_bias, channels, parts)
    _gradient[y is not None](
        None if kind is None else (*kind, args.residual), apply_grid,
        grad, x, y, mean, invstd, weight, grad_weight, grad_bias, grad_x, grad_residual, rows, channels,
    )  # fmt: skip
    return grad_x, grad_weight, grad_bias, x.new_empty(0) if grad_residual is None else grad_residual
