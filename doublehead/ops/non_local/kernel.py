"""Triton kernels of the attention: forward, and backward with the weights computed anew.

A program holds the pairwise products of a block of cells with all T cells of its RoI, `[ROWS, CELLS]` in float32, and
walks the features in chunks: first to add the products up, then to mix.  No tile is as wide as a group, so neither
registers nor shared memory grow with it.  Nothing is padded in memory: cells beyond T are masked, and a chunk divides
the width of a group.  Each result is stored once, by one program: no atomics, the same bits every time.

Within a RoI all offsets are small; the RoI's own offset is int64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._library import warn_fallback
from .._triton import Launcher, aligned, blocks, kind_of, matmul_precision
from . import reference
from .attention import Attention

MAX_CELLS = 256
MAX_WIDTH = 512


# ---------------------------------------------------------------------------------------------
# Tiles


@triton.jit
def _load(base, rows, row_stride, columns, count):
    """`[rows, columns]` of a matrix with `count` rows; rows beyond are zeros."""
    return tl.load(base + rows[:, None] * row_stride + columns[None, :], mask=rows[:, None] < count, other=0.0)


@triton.jit
def _store(base, rows, row_stride, columns, count, tile):
    mask = (rows[:, None] < count) & (columns[None, :] >= 0)
    tl.store(base + rows[:, None] * row_stride + columns[None, :], tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _feature_and_row(cells, groups, WIDTH: tl.constexpr):
    """The first feature of this program's group, and the first row of its RoI."""
    roi = (tl.program_id(0) // groups).to(tl.int64)
    return tl.program_id(0) % groups * WIDTH, roi * cells


@triton.jit
def _products(a, b, rows, columns, a_stride, b_stride, cells, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
              PRECISION: tl.constexpr):  # fmt: skip
    """`a[rows] @ b[columns].T` in fp32, over a group's features."""
    total = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    for start in range(0, WIDTH, CHUNK):
        features = start + tl.arange(0, CHUNK)
        left = _load(a, rows, a_stride, features, cells)
        right = _load(b, columns, b_stride, features, cells)
        total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
    return total


@triton.jit
def _mix(weights, source, target, rows, columns, source_stride, target_stride, cells, WIDTH: tl.constexpr,
         CHUNK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """`target[rows] = weights @ source[columns]`, over a group's features."""
    for start in range(0, WIDTH, CHUNK):
        features = start + tl.arange(0, CHUNK)
        tile = tl.dot(weights, _load(source, columns, source_stride, features, cells), input_precision=PRECISION)
        _store(target, rows, target_stride, features, cells, tile)


@triton.jit
def _softmax(logits, columns, cells):
    """Over each row's `cells` first columns: the weights, the row's maximum, and its sum of exponentials."""
    logits = tl.where(columns[None, :] < cells, logits, float("-inf"))
    largest = tl.max(logits, 1)
    weights = tl.exp(logits - largest[:, None])
    total = tl.sum(weights, 1)
    return weights / total[:, None], largest, total


# ---------------------------------------------------------------------------------------------
# Kernels.  Grid: (RoIs * groups, blocks of rows)


@triton.jit(do_not_specialize_on_alignment=["count"])
def forward(qkv, out, count, cells, groups, scale, SOFTMAX: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
            CELLS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    feature, row = _feature_and_row(cells, groups, WIDTH)
    queries = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    keys = tl.arange(0, CELLS)
    inner = groups * WIDTH
    stride = 3 * inner
    q = qkv + row * stride + feature
    k, v = q + inner, q + 2 * inner

    if count is not None:  # a map that does not count has no cells: nothing is loaded, nothing stored
        cells = tl.where(tl.program_id(0) // groups < tl.load(count), cells, 0)
    weights = _products(q, k, queries, keys, stride, stride, cells, WIDTH, CHUNK, PRECISION) * scale
    if SOFTMAX:
        weights, _, _ = _softmax(weights, keys, cells)
    mixed = out + row * inner + feature
    _mix(weights.to(qkv.dtype.element_ty), v, mixed, queries, keys, stride, inner, cells, WIDTH, CHUNK, PRECISION)


@triton.jit
def backward_whole(qkv, grad, grad_qkv, cells, groups, scale, SOFTMAX: tl.constexpr, WIDTH: tl.constexpr,
                   ROWS: tl.constexpr, CELLS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """All three gradients of a RoI that is one tile."""
    feature, row = _feature_and_row(cells, groups, WIDTH)
    every = tl.arange(0, CELLS)
    inner = groups * WIDTH
    stride = 3 * inner
    q = qkv + row * stride + feature
    k, v = q + inner, q + 2 * inner
    g = grad + row * inner + feature
    grad_q = grad_qkv + row * stride + feature

    weights = _products(q, k, every, every, stride, stride, cells, WIDTH, CHUNK, PRECISION) * scale
    grad_logits = _products(g, v, every, every, inner, stride, cells, WIDTH, CHUNK, PRECISION)
    if SOFTMAX:
        weights, _, _ = _softmax(weights, every, cells)
        grad_logits = weights * (grad_logits - tl.sum(grad_logits * weights, 1)[:, None])
    dtype = qkv.dtype.element_ty
    weights = tl.trans(weights.to(dtype))
    grad_logits = (grad_logits * scale).to(dtype)
    turned = tl.trans(grad_logits)
    _mix(grad_logits, k, grad_q, every, every, stride, stride, cells, WIDTH, CHUNK, PRECISION)
    _mix(turned, q, grad_q + inner, every, every, stride, stride, cells, WIDTH, CHUNK, PRECISION)
    _mix(weights, g, grad_q + 2 * inner, every, every, inner, stride, cells, WIDTH, CHUNK, PRECISION)


@triton.jit
def backward_queries(qkv, grad, grad_qkv, statistics, cells, groups, scale, SOFTMAX: tl.constexpr,
                     WIDTH: tl.constexpr, ROWS: tl.constexpr, CELLS: tl.constexpr, CHUNK: tl.constexpr,
                     PRECISION: tl.constexpr):  # fmt: skip
    """The queries' gradient.  Stores the maximum, the sum and the mean gradient of each softmax for `backward_keys`."""
    feature, row = _feature_and_row(cells, groups, WIDTH)
    queries = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    keys = tl.arange(0, CELLS)
    inner = groups * WIDTH
    stride = 3 * inner
    q = qkv + row * stride + feature
    k, v = q + inner, q + 2 * inner
    g = grad + row * inner + feature
    grad_q = grad_qkv + row * stride + feature

    grad_logits = _products(g, v, queries, keys, inner, stride, cells, WIDTH, CHUNK, PRECISION)
    if SOFTMAX:
        logits = _products(q, k, queries, keys, stride, stride, cells, WIDTH, CHUNK, PRECISION) * scale
        weights, largest, total = _softmax(logits, keys, cells)
        mean = tl.sum(grad_logits * weights, 1)
        grad_logits = weights * (grad_logits - mean[:, None])
        left = statistics + tl.program_id(0).to(tl.int64) * 3 * cells + queries
        tl.store(left, largest, mask=queries < cells)
        tl.store(left + cells, total, mask=queries < cells)
        tl.store(left + 2 * cells, mean, mask=queries < cells)
    grad_logits = (grad_logits * scale).to(qkv.dtype.element_ty)
    _mix(grad_logits, k, grad_q, queries, keys, stride, stride, cells, WIDTH, CHUNK, PRECISION)


@triton.jit
def backward_keys(qkv, grad, grad_qkv, statistics, cells, groups, scale, SOFTMAX: tl.constexpr,
                  WIDTH: tl.constexpr, ROWS: tl.constexpr, CELLS: tl.constexpr, CHUNK: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """The gradients of a block of keys and of their values.

    Weights of keys beyond T are undefined, infinite too: each fills a row of its own, which is never stored.
    """
    feature, row = _feature_and_row(cells, groups, WIDTH)
    keys = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    queries = tl.arange(0, CELLS)
    inner = groups * WIDTH
    stride = 3 * inner
    q = qkv + row * stride + feature
    k, v = q + inner, q + 2 * inner
    g = grad + row * inner + feature
    grad_q = grad_qkv + row * stride + feature

    weights = _products(q, k, queries, keys, stride, stride, cells, WIDTH, CHUNK, PRECISION) * scale
    left = statistics + tl.program_id(0).to(tl.int64) * 3 * cells + queries
    if SOFTMAX:
        largest = tl.load(left, mask=queries < cells, other=0.0)
        total = tl.load(left + cells, mask=queries < cells, other=1.0)
        weights = tl.exp(weights - largest[:, None]) / total[:, None]
    dtype = qkv.dtype.element_ty
    turned = tl.trans(weights.to(dtype))
    _mix(turned, g, grad_q + 2 * inner, keys, queries, inner, stride, cells, WIDTH, CHUNK, PRECISION)

    grad_logits = _products(g, v, queries, keys, inner, stride, cells, WIDTH, CHUNK, PRECISION)
    if SOFTMAX:
        mean = tl.load(left + 2 * cells, mask=queries < cells, other=0.0)
        grad_logits = weights * (grad_logits - mean[:, None])
    turned = tl.trans((grad_logits * scale).to(dtype))
    _mix(turned, q, grad_q + inner, keys, queries, stride, stride, cells, WIDTH, CHUNK, PRECISION)


# ---------------------------------------------------------------------------------------------
# Launchers


class Configuration(NamedTuple):
    """A kernel's tile, warps and pipeline stages."""

    rows: int
    """Rows of a program's tile of pairwise products."""
    cells: int
    """Columns of that tile: all cells of a RoI."""
    chunk: int
    """Most features at a time; the kernel takes a divisor of the group's width."""
    num_warps: int
    num_stages: int


#: (kernel, 16-bit input) -> the configurations, by T; without spills on sm_80, sm_90 and sm_100 (tests/).
#: 16-bit tiles have the 64 rows that wgmma wants; float32 has no tensor cores to feed, and small tiles.
CONFIGURATIONS: dict[tuple[str, bool], tuple[Configuration, ...]] = {
    ("forward", True): (
        Configuration(64, 64, 64, 8, 3),
        Configuration(64, 128, 64, 8, 2),
        Configuration(64, 256, 32, 8, 2),
    ),
    ("backward_whole", True): (Configuration(64, 64, 64, 8, 3),),
    ("backward_blocks", True): (Configuration(64, 128, 64, 8, 2), Configuration(64, 256, 32, 8, 2)),
    ("forward", False): (
        Configuration(32, 64, 16, 4, 1),
        Configuration(16, 128, 16, 8, 1),
        Configuration(16, 256, 16, 8, 2),
    ),
    ("backward_whole", False): (Configuration(64, 64, 16, 8, 1),),
    ("backward_blocks", False): (Configuration(16, 128, 16, 8, 1), Configuration(16, 256, 16, 4, 1)),
}


def configuration(kernel: str, cells: int, dtype: torch.dtype) -> Configuration | None:
    """The first configuration that holds `cells` columns, or None."""
    fitting = (c for c in CONFIGURATIONS[kernel, dtype.itemsize == 2] if c.cells >= cells)
    return next(fitting, None)


def non_local_attention(qkv: Tensor, attention: Attention, count: Tensor | None = None) -> Tensor:
    """See `reference.non_local_attention`, which serves what the kernel does not.

    `count`: `Tensor[]` int64: RoIs from this one on may be left unwritten.  None: all are written.
    """
    if not _served("non_local_attention", attention.groups, qkv):
        return reference.non_local_attention(qkv, attention)
    qkv = qkv.contiguous()
    number, cells, inner = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    out = torch.empty((number, cells, inner), dtype=qkv.dtype, device=qkv.device)
    chosen = configuration("forward", cells, qkv.dtype)
    _launch(forward, chosen, (qkv, out, count), attention)
    return out


def non_local_attention_backward(grad: Tensor, qkv: Tensor, attention: Attention) -> Tensor:
    """See `reference.non_local_attention_backward`."""
    if not _served("non_local_attention_backward", attention.groups, qkv, grad):
        return reference.non_local_attention_backward(grad, qkv, attention)
    grad, qkv = grad.contiguous(), qkv.contiguous()
    number, cells, _ = qkv.shape
    grad_qkv = torch.empty_like(qkv)
    whole = configuration("backward_whole", cells, qkv.dtype)
    if whole:
        _launch(backward_whole, whole, (qkv, grad, grad_qkv), attention)
        return grad_qkv
    chosen = configuration("backward_blocks", cells, qkv.dtype)
    size = (number, attention.groups, 3, cells) if attention.softmax else (0,)
    statistics = torch.empty(size, dtype=torch.float32, device=qkv.device)
    for kernel in (backward_queries, backward_keys):
        _launch(kernel, chosen, (qkv, grad, grad_qkv, statistics), attention)
    return grad_qkv


def _served(name: str, groups: int, qkv: Tensor, grad: Tensor | None = None) -> bool:
    """Whether the kernels serve this call.  Warns once where a user could change that."""
    if not qkv.numel() or qkv.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return False
    reason = _unserved(qkv.shape[1], qkv.shape[2] // 3 // groups, qkv, grad)
    if reason is not None:
        warn_fallback(name, reason, qkv.device.type)
    return reason is None


def _unserved(cells: int, width: int, qkv: Tensor, grad: Tensor | None) -> str | None:
    """The reason to refuse a call, or None; a constant text, as each is warned of once."""
    if cells > MAX_CELLS:
        return f"maps of more than {MAX_CELLS} cells are not served"
    if width % 16 or width > MAX_WIDTH:
        return f"a group of inner channels must be a multiple of 16 up to {MAX_WIDTH} wide"
    # What is not contiguous is copied, and a copy is aligned.
    given = [tensor for tensor in (qkv, grad) if tensor is not None and tensor.is_contiguous()]
    return None if aligned(*given) else "a tensor begins at an address that is no multiple of 16 bytes"


def _launch(kernel, chosen: Configuration, tensors: tuple[Tensor | None, ...], attention: Attention) -> None:
    number, cells, features = tensors[0].shape
    width, precision = features // 3 // attention.groups, matmul_precision(tensors[0].dtype)
    variant = id(kernel), chosen, width, attention.softmax, precision
    launch = _LAUNCHERS.get(variant)
    if launch is None:
        options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
        launch = Launcher(kernel, **constants(chosen, width, attention.softmax, precision), **options)
        _LAUNCHERS[variant] = launch
    kind = kind_of(*tensors)
    launch(
        None if kind is None else (*kind, cells, attention.groups),
        (number * attention.groups, blocks(cells, chosen.rows), 1),
        *tensors, cells, attention.groups, attention.scale,
    )  # fmt: skip


_LAUNCHERS: dict[tuple, Launcher] = {}


def constants(chosen: Configuration, width: int, softmax: bool, precision: str) -> dict[str, int | bool | str]:
    """The constants that a kernel is compiled with."""
    return {
        "SOFTMAX": softmax,
        "WIDTH": width,
        "ROWS": chosen.rows,
        "CELLS": chosen.cells,
        "CHUNK": min(chosen.chunk, width & -width),  # a power of two that divides the width
        "PRECISION": precision,
    }
