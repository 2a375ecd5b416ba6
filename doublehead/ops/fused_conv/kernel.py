"""Fused convolution in Triton: a tiled matrix product that gathers its rows and finishes its tile in registers.

A tile is BLOCK_M cells x BLOCK_N output channels. The inner dimension runs over the taps of the kernel (1 or 9), within
a tap over channels; a tap's row is the cell's neighbour, or nothing at the border of its map. With `mean`, a tile holds
the cells of one map, and is averaged before it is stored: a map of 7 x 7 fills 49 of 64 rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._library import Fallback
from .._triton import UNALIGNED, aligned, convolution_precision
from . import reference
from .arguments import FusedConvArguments

MOST_CELLS_OF_MEAN = 64
"""Larger maps are averaged after the product, as their cells do not fit one tile."""


class Tile(NamedTuple):
    """The sizes of a tile, and its warps and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def tile_of(dtype: torch.dtype, mean: bool, capability: tuple[int, int]) -> Tile:
    """The tile from a fixed table: with autotuning, results would depend on timings."""
    if dtype == torch.float32:  # on sm_100 the residual of the large tile would spill
        return Tile(64, 64, 32, 4, 3) if mean or capability >= (10, 0) else Tile(128, 128, 32, 8, 3)
    return Tile(64, 128, 64, 4, 3) if mean else Tile(128, 128, 64, 8, 3)


def most_registers(
    dtype: torch.dtype, mean: bool, residual: bool, count: bool, capability: tuple[int, int]
) -> int | None:
    """The limit of registers for each thread, or None.

    With 128, two blocks of 256 threads share a multiprocessor; without a limit the compiler takes a few more, and only
    one block fits.  Only sm_90 keeps the sum in few enough registers: elsewhere, and for other variants, some spill.
    """
    fits = capability == (9, 0) and dtype != torch.float32 and not mean and (count or not residual)
    return 128 if fits else None


def serves(dtype: torch.dtype) -> bool:
    """Whether the kernel is the fastest choice: exact float32 does without tensor cores, and there cuBLAS is faster."""
    return dtype != torch.float64 and (dtype != torch.float32 or convolution_precision(dtype) == "tf32")


@triton.jit
def accumulate(
    acc, x, weight, row, column, inside_row, out_channels, channels, first_weight, row_weights, height, width,
    TAPS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + rows of x (gathered by tap) times the weights [column, first_weight + tap * channels + channel]."""
    steps = tl.cdiv(channels, BLOCK_K)
    of_column = column < out_channels
    weight_row = weight + column.to(tl.int64) * row_weights + first_weight
    for step in range(TAPS * steps):
        tap = step // steps
        channel = (step - tap * steps) * BLOCK_K + tl.arange(0, BLOCK_K)
        of_channel = channel < channels
        source, valid = row, inside_row
        if TAPS == 9:
            down = tap // 3 - 1
            right = tap % 3 - 1
            y = (row // width) % height + down
            x_cell = row % width + right
            source = row + down * width + right
            valid = inside_row & (y >= 0) & (y < height) & (x_cell >= 0) & (x_cell < width)
        a = tl.load(
            x + source.to(tl.int64)[:, None] * channels + channel[None, :],
            mask=valid[:, None] & of_channel[None, :],
            other=0.0,
        )
        b = tl.load(
            weight_row[None, :] + (tap * channels + channel)[:, None],
            mask=of_column[None, :] & of_channel[:, None],
            other=0.0,
        )
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["count"])
def fused_conv_kernel(
    x, second, weight, bias, residual, count, out, rows, channels, second_channels, out_channels, height, width,
    TAPS: tl.constexpr, RELU: tl.constexpr, MEAN: tl.constexpr, FILL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Programs next to each other share rows: the columns of weights are few and stay in the second-level cache.
    columns = tl.cdiv(out_channels, BLOCK_N)
    tile = tl.program_id(0) // columns
    column = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    of_column = column < out_channels
    cells = height * width
    lane = tl.arange(0, BLOCK_M)
    if MEAN:
        first = tile * cells
        row = first + lane
        inside = lane < cells
    else:
        first = tile * BLOCK_M
        row = first + lane
        inside = row < rows
    live = rows
    if count is not None:
        live = tl.minimum(tl.load(count) * cells, rows).to(tl.int32)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if first < live:
        weights = TAPS * channels + second_channels
        acc = accumulate(
            acc, x, weight, row, column, inside, out_channels, channels, 0, weights, height, width,
            TAPS, PRECISION, BLOCK_K,
        )  # fmt: skip
        if second is not None:
            acc = accumulate(
                acc, second, weight, row, column, inside, out_channels, second_channels, channels, weights,
                height, width, 1, PRECISION, BLOCK_K,
            )  # fmt: skip
        if bias is not None:
            acc += tl.load(bias + column, mask=of_column, other=0.0).to(tl.float32)[None, :]
        at = row.to(tl.int64)[:, None] * out_channels + column[None, :]
        kept = inside[:, None] & of_column[None, :]
        if residual is not None:
            acc += tl.load(residual + at, mask=kept, other=0.0).to(tl.float32)
        if RELU:  # NaN stays NaN, as torch.relu has it
            acc = tl.where(acc < 0, 0.0, acc)
        acc = tl.where((row < live)[:, None], acc, 0.0)

    if MEAN:
        average = tl.sum(tl.where(inside[:, None], acc, 0.0), 0) / cells
        tl.store(out + tile.to(tl.int64) * out_channels + column, average.to(out.dtype.element_ty), mask=of_column)
    else:
        at = row.to(tl.int64)[:, None] * out_channels + column[None, :]
        wanted = inside if FILL else inside & (row < live)
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=wanted[:, None] & of_column[None, :])


def capability_of(x: Tensor) -> tuple[int, int]:
    """The GPU's compute capability; (0, 0) in Triton's interpreter."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda and torch.version.hip is None else (0, 0)


def fused_conv(conv: FusedConvArguments, fill: bool = True) -> Tensor:
    """Launches the kernel; without `fill`, maps from `conv.count` on may be left unwritten."""
    height, width = conv.size
    rows, channels = conv.x.shape
    cells, outputs = height * width, len(conv.weight)
    if not serves(conv.x.dtype) or rows >= 2**31:
        return reference.fused_conv(conv)
    if conv.mean and cells > MOST_CELLS_OF_MEAN:
        return fused_conv(conv._replace(mean=False)).view(-1, cells, outputs).mean(1)
    x, second, residual = (
        tensor if tensor is None else tensor.contiguous() for tensor in (conv.x, conv.second, conv.residual)
    )
    second_channels = 0 if second is None else second.shape[1]
    memory_format = torch.channels_last if conv.weight.dim() == 4 else torch.contiguous_format
    weight = conv.weight.contiguous(memory_format=memory_format)
    if not aligned(x, second, residual, weight, conv.bias, channels, second_channels, outputs):
        raise Fallback(UNALIGNED)
    capability, precision = capability_of(x), convolution_precision(x.dtype)
    tile = tile_of(x.dtype, conv.mean, capability)
    tiles = rows // cells if conv.mean else triton.cdiv(rows, tile.m)
    out = x.new_empty((rows // cells if conv.mean else rows, outputs))
    if out.numel():
        fused_conv_kernel[(triton.cdiv(outputs, tile.n) * tiles,)](
            x, second, weight, conv.bias, residual, conv.count, out, rows, channels, second_channels, outputs,
            height, width,
            TAPS=9 if weight.dim() == 4 else 1, RELU=conv.relu, MEAN=conv.mean, FILL=fill, PRECISION=precision,
            BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, num_warps=tile.warps, num_stages=tile.stages,
            maxnreg=most_registers(x.dtype, conv.mean, residual is not None, conv.count is not None, capability),
        )  # fmt: skip
    return out
