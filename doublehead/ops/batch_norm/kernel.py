"""Batch normalisation with residual and ReLU in Triton: sums over rows in two steps, then one pass that applies them.

Rows are split into a fixed number of parts. Each program sums one part of a block of channels; a second, tiny kernel
joins the parts in order. So results depend on shapes alone, not on scheduling. The mean and the sum of squared
deviations are joined by the rule of Chan et al. (1979), which does not subtract large numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .arguments import ApplyArguments, BackwardArguments, ForwardArguments

ROWS, CHANNELS = 32, 64  # a tile of the sums: 128-byte lines of 16-bit values
APPLY_ROWS, APPLY_CHANNELS = 16, 128
MOST_PARTS = 128
WARPS = 4
_ROWS = ("rows", "part_rows", "parts")  # numbers that change from batch to batch: no kernel is compiled for each


@triton.jit
def join(count, mean, squares, other_count, other_mean, other_squares):
    """Mean and sum of squared deviations of two sets together (Chan et al. 1979)."""
    total = count + other_count
    share = tl.where(total > 0, other_count / tl.maximum(total, 1.0), 0.0)
    step = other_mean - mean
    return total, mean + step * share, squares + other_squares + step * step * count * share


@triton.jit(do_not_specialize=_ROWS)
def statistics_kernel(x, means, squares, rows, channels, part_rows, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Mean, less the first row, and squared deviations of one part of the rows, for a block of channels."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    part = tl.program_id(1)
    begin = part * part_rows
    end = tl.minimum(begin + part_rows, rows)
    count = 0.0
    mean = tl.zeros((CHANNELS,), tl.float32)
    square = tl.zeros((CHANNELS,), tl.float32)
    # Sums of what is left of large values without the first row's are small, and so are their rounding errors.
    pivot = tl.load(x + channel, mask=channel < channels, other=0.0).to(tl.float32)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & (channel < channels)[None, :]
        tile = tl.load(x + row.to(tl.int64)[:, None] * channels + channel[None, :], mask=inside, other=0.0)
        tile = tile.to(tl.float32) - pivot[None, :]
        here = tl.minimum(end - first, ROWS).to(tl.float32)
        tile_mean = tl.sum(tl.where(inside, tile, 0.0), 0) / here
        off = tl.where(inside, tile - tile_mean[None, :], 0.0)
        count, mean, square = join(count, mean, square, here, tile_mean, tl.sum(off * off, 0))
    tl.store(means + part * channels + channel, mean, mask=channel < channels)
    tl.store(squares + part * channels + channel, square, mask=channel < channels)


@triton.jit(do_not_specialize=_ROWS)
def join_statistics_kernel(
    x, means, squares, mean_out, invstd_out, rows, channels, part_rows, parts, eps, CHANNELS: tl.constexpr
):
    """All parts of a block of channels, joined in order."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    count = 0.0
    mean = tl.zeros((CHANNELS,), tl.float32)
    square = tl.zeros((CHANNELS,), tl.float32)
    for part in range(parts):
        here = tl.minimum(rows - part * part_rows, part_rows).to(tl.float32)
        part_mean = tl.load(means + part * channels + channel, mask=inside, other=0.0)
        part_square = tl.load(squares + part * channels + channel, mask=inside, other=0.0)
        count, mean, square = join(count, mean, square, here, part_mean, part_square)
    mean += tl.load(x + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(mean_out + channel, mean, mask=inside)
    tl.store(invstd_out + channel, 1.0 / tl.sqrt_rn(square / rows + eps), mask=inside)


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
    grad, x, y, mean, invstd, grad_weights, grad_biases, rows, channels, part_rows,
    RELU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums of the gradient, and of gradient times normalised x, over one part of the rows."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    part = tl.program_id(1)
    begin = part * part_rows
    end = tl.minimum(begin + part_rows, rows)
    centre = tl.load(mean + channel, mask=channel < channels, other=0.0)
    scale = tl.load(invstd + channel, mask=channel < channels, other=0.0)
    grad_weight = tl.zeros((CHANNELS,), tl.float32)
    grad_bias = tl.zeros((CHANNELS,), tl.float32)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & (channel < channels)[None, :]
        at = row.to(tl.int64)[:, None] * channels + channel[None, :]
        slope = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        if RELU:
            slope = tl.where(tl.load(y + at, mask=inside, other=0.0) > 0, slope, 0.0)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        grad_bias += tl.sum(slope, 0)
        grad_weight += tl.sum(slope * ((value - centre[None, :]) * scale[None, :]), 0)
    tl.store(grad_weights + part * channels + channel, grad_weight, mask=channel < channels)
    tl.store(grad_biases + part * channels + channel, grad_bias, mask=channel < channels)


@triton.jit(do_not_specialize=_ROWS)
def join_gradients_kernel(
    grad_weights, grad_biases, grad_weight, grad_bias, channels, parts, CHANNELS: tl.constexpr, PARTS: tl.constexpr
):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    part = tl.arange(0, PARTS)
    inside = (part < parts)[:, None] & (channel < channels)[None, :]
    at = part[:, None] * channels + channel[None, :]
    of_weight = tl.sum(tl.load(grad_weights + at, mask=inside, other=0.0), 0)
    of_bias = tl.sum(tl.load(grad_biases + at, mask=inside, other=0.0), 0)
    tl.store(grad_weight + channel, of_weight, mask=channel < channels)
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
    sum_weight = tl.load(grad_weight + channel, mask=of_channel, other=0.0)
    sum_bias = tl.load(grad_bias + channel, mask=of_channel, other=0.0)
    slope = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        slope = tl.where(tl.load(y + at, mask=inside, other=0.0) > 0, slope, 0.0)
    value = (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - centre[None, :]) * scale[None, :]
    of_x = (slope - (sum_bias[None, :] + value * sum_weight[None, :]) / rows) * factor[None, :]
    tl.store(grad_x + at, of_x.to(grad_x.dtype.element_ty), mask=inside)
    if grad_residual is not None:
        tl.store(grad_residual + at, slope.to(grad_residual.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------------------------------------
# Launchers: the operators' arguments, in order


def parts_of(rows: int) -> tuple[int, int]:
    """How many parts the rows are split into, and the rows of each (the last may have fewer)."""
    part_rows = triton.cdiv(triton.cdiv(rows, MOST_PARTS), ROWS) * ROWS
    return triton.cdiv(rows, part_rows), part_rows


def _sums_grid(channels: int, parts: int) -> tuple[int, int]:
    return triton.cdiv(channels, CHANNELS), parts


def _apply_grid(rows: int, channels: int) -> tuple[int, int]:
    return triton.cdiv(rows, APPLY_ROWS), triton.cdiv(channels, APPLY_CHANNELS)


def batch_norm_act(args: ForwardArguments) -> tuple[Tensor, Tensor, Tensor]:
    if args.x.dtype == torch.float64:
        return reference.batch_norm_act(args)
    x = args.x.contiguous()
    rows, channels = x.shape
    parts, part_rows = parts_of(rows)
    means, squares = (x.new_empty((parts, channels), dtype=torch.float32) for _ in range(2))
    mean, invstd = (x.new_empty(channels, dtype=torch.float32) for _ in range(2))
    statistics_kernel[_sums_grid(channels, parts)](
        x, means, squares, rows, channels, part_rows, ROWS=ROWS, CHANNELS=CHANNELS, num_warps=WARPS
    )
    join_statistics_kernel[(triton.cdiv(channels, CHANNELS),)](
        x, means, squares, mean, invstd, rows, channels, part_rows, parts, args.eps, CHANNELS=CHANNELS, num_warps=1
    )
    y = batch_norm_act_apply(ApplyArguments(x, mean, invstd, args.weight, args.bias, args.residual, args.relu))
    return y, mean, invstd


def batch_norm_act_apply(args: ApplyArguments) -> Tensor:
    if args.x.dtype == torch.float64:
        return reference.batch_norm_act_apply(args)
    x, residual = args.x.contiguous(), args.residual
    rows, channels = x.shape
    y = torch.empty_like(x)
    apply_kernel[_apply_grid(rows, channels)](
        x, None if residual is None else residual.contiguous(), args.mean, args.invstd, args.weight, args.bias, y,
        rows, channels,
        RESIDUAL=residual is not None, RELU=args.relu, ROWS=APPLY_ROWS, CHANNELS=APPLY_CHANNELS, num_warps=WARPS,
    )  # fmt: skip
    return y


def batch_norm_act_backward(args: BackwardArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if args.x.dtype == torch.float64:
        return reference.batch_norm_act_backward(args)
    grad, x = args.grad.contiguous(), args.x.contiguous()
    y, mean, invstd, weight = args.y, args.mean, args.invstd, args.weight
    rows, channels = x.shape
    parts, part_rows = parts_of(rows)
    grad_weights, grad_biases = (x.new_empty((parts, channels), dtype=torch.float32) for _ in range(2))
    grad_weight, grad_bias = (x.new_empty(channels, dtype=torch.float32) for _ in range(2))
    gradient_sums_kernel[_sums_grid(channels, parts)](
        grad, x, y, mean, invstd, grad_weights, grad_biases, rows, channels, part_rows,
        RELU=y is not None, ROWS=ROWS, CHANNELS=CHANNELS, num_warps=WARPS,
    )  # fmt: skip
    join_gradients_kernel[(triton.cdiv(channels, CHANNELS),)](
        grad_weights, grad_biases, grad_weight, grad_bias, channels, parts,
        CHANNELS=CHANNELS, PARTS=MOST_PARTS, num_warps=2 * WARPS,
    )  # fmt: skip
    grad_x, grad_residual = torch.empty_like(x), torch.empty_like(x) if args.residual else None
    gradient_kernel[_apply_grid(rows, channels)](
        grad, x, y, mean, invstd, weight, grad_weight, grad_bias, grad_x, grad_residual, rows, channels,
        RELU=y is not None, ROWS=APPLY_ROWS, CHANNELS=APPLY_CHANNELS, num_warps=WARPS,
    )  # fmt: skip
    return grad_x, grad_weight, grad_bias, x.new_empty(0) if grad_residual is None else grad_residual
