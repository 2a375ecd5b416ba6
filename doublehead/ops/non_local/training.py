"""The non-local block in training, with the statistics of its batch: one node of autograd's graph.

Remembers the input, queries, keys and values, the attention's result, its projection, and what ReLU gave.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._dtypes import layer_dtype
from .._library import in_functorch_transform, kernel, without_layers
from ..batch_norm.layer import Norm, Statistics, normalize, normalize_backward
from ..batch_norm.op import check_rows
from ..fused_conv.gradient import convolve, convolve_backward, kernel_of
from .attention import Attention


class Projections(NamedTuple):
    """The 1x1 convolutions of a block; those of queries, keys and values in one tensor or in three."""

    qkv: Sequence[Tensor]
    """`Tensor[3 * D, C, 1, 1]`, or thrice `Tensor[D, C, 1, 1]`"""
    qkv_bias: Sequence[Tensor]
    """The same with one dimension, or nothing."""
    out: Tensor
    """`Tensor[C, D, 1, 1]`"""
    out_bias: Tensor | None
    """`Tensor[C]`"""


def serves(x: Tensor) -> bool:
    """Whether `train` takes x, maps or rows: where the dtypes of the sum's two sides agree, and nothing traces."""
    return layer_dtype(x) == x.dtype and not torch.compiler.is_compiling() and not in_functorch_transform()


def train(
    x: Tensor, size: Sequence[int], weights: Projections, norm: Norm, attention: Attention, relu: bool
) -> tuple[Tensor, Statistics]:
    """y = act(x + norm(out(attention(qkv(x))))) with the statistics of the batch.

    Args:
        x: `Tensor[N * H * W, C]`, the cells of N maps; the projections run in its dtype.
        size: (H, W).
        weights: of any floating dtype.
        norm: batch norm over C channels.
        attention: its options.
        relu: act is ReLU, else the identity.
    Returns:
        `Tensor[N * H * W, C]`, and the statistics of the norm.
    Raises:
        ValueError: there are no cells.
    """
    check_rows(x)
    step = _Step(list(size), len(weights.qkv), bool(weights.qkv_bias), attention, norm.eps, relu, [])
    y = _Block.apply(
        x, step, norm.weight, norm.bias, weights.out, weights.out_bias, *weights.qkv, *weights.qkv_bias
    )  # fmt: skip
    return y, step.statistics[0]


class _Step(NamedTuple):
    """What forward and backward share besides tensors."""

    size: list[int]
    parts: int
    """Tensors of weights that queries, keys and values come in."""
    biased: bool
    attention: Attention
    eps: float
    relu: bool
    statistics: list[Statistics]
    """Filled by the forward."""


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, step: _Step, weight, bias, out, out_bias, *parts) -> Tensor:
        with without_layers():
            qkv_weight = kernel_of(_joined(parts[: step.parts]), x.dtype)
            qkv_bias = _joined(parts[step.parts :]).to(x.dtype) if step.biased else None
            out = kernel_of(out, x.dtype)
            qkv = convolve(x, qkv_weight, qkv_bias, step.size)
            attend = kernel("non_local_attention", x)
            mixed = attend(_by_map(qkv, step.size), *step.attention).flatten(0, 1)
            out_bias = None if out_bias is None else out_bias.to(x.dtype)
            projected = convolve(mixed, out, out_bias, step.size)
            y, statistics = normalize(projected, Norm(weight, bias, step.eps), x, step.relu)
        step.statistics.append(statistics)
        ctx.step = step
        ctx.save_for_backward(
            x, weight, bias, out, qkv_weight, qkv, mixed, projected, y if step.relu else None, *statistics
        )  # fmt: skip
        ctx.out_bias = None if out_bias is None else out_bias.shape
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        step, (of_x, _, *_, of_out, of_out_bias) = ctx.step, ctx.needs_input_grad[:6]
        of_parts = ctx.needs_input_grad[6:]
        x, weight, bias, out, qkv_weight, qkv, mixed, projected, y, *statistics = ctx.saved_tensors
        with without_layers():
            norm = Norm(weight, bias, step.eps)
            grad, grad_weight, grad_bias, grad_x = normalize_backward(
                grad, projected, y, norm, Statistics(*statistics), residual=of_x
            )
            # The batch norm takes the bias off again: its gradient is zero, and a sum would be noise.
            grad_out_bias = grad.new_zeros(ctx.out_bias) if of_out_bias else None
            grad, grad_out = convolve_backward(grad, mixed, out, step.size, of_weight=of_out)
            attend_backward = kernel("non_local_attention_backward", x)
            grad = attend_backward(_by_map(grad, step.size), _by_map(qkv, step.size), *step.attention).flatten(0, 1)
            grad_qkv_bias = _split(grad.sum(0), step.parts) if any(of_parts[step.parts :]) else [None] * len(
                of_parts[step.parts :]
            )  # fmt: skip
            grad_x, grad_qkv = convolve_backward(
                grad, x, qkv_weight, step.size, add_to=grad_x, of_rows=of_x, of_weight=any(of_parts[: step.parts])
            )
            grads = [None] * step.parts if grad_qkv is None else _split(grad_qkv[:, :, None, None], step.parts)
            grad_out = None if grad_out is None else grad_out[:, :, None, None]
        return grad_x, None, grad_weight, grad_bias, grad_out, grad_out_bias, *grads, *grad_qkv_bias


def _by_map(rows: Tensor, size: Sequence[int]) -> Tensor:
    """`Tensor[N * H * W, C]` as `Tensor[N, H * W, C]`."""
    cells = size[0] * size[1]
    return rows.view(rows.shape[0] // cells, cells, rows.shape[1])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _split(grad: Tensor, parts: int) -> Sequence[Tensor]:
    return [grad] if parts == 1 else grad.split(grad.shape[0] // parts)
