"""The conv-head's residual blocks in training: each one node of autograd's graph, with fewer maps remembered.

Plain modules remember the result of every convolution (for the batch norm) and of every ReLU (for the next
convolution). Here the backward computes again what is cheap beside the rest: what ReLU gave, a pass over memory, and
what the 1x1 convolutions to the full width gave, 5 % more work in all for a third less memory. With `recompute` only
the block's input is remembered.

On a GPU a step is as long as its launches take the host, if it does not spare them. So a block is a single autograd
function, below which no operator passes autograd's or autocast's layers again, and gradients that meet are added by
the product that makes the second one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops._library import without_layers
from ..ops.batch_norm.layer import Norm, Statistics, normalize, normalize_again, normalize_backward
from ..ops.batch_norm.op import check_rows
from ..ops.fused_conv.gradient import convolve, convolve_backward, kernel_of


class ConvNorm(NamedTuple):
    """A convolution without bias, and the batch norm behind it."""

    conv: Tensor
    """`Tensor[out, in, k, k]`, k = 1 or 3 (padded by one), of any floating dtype."""
    weight: Tensor
    """`Tensor[out]`"""
    bias: Tensor
    """`Tensor[out]`"""
    eps: float


def bottleneck(
    x: Tensor, layers: Sequence[ConvNorm], size: Sequence[int], recompute: bool = False
) -> tuple[Tensor, list[Statistics]]:
    """relu(norm(conv(relu(norm(conv(relu(norm(conv(x)))))))) + x) in training.

    Args:
        x: `Tensor[N * H * W, C]`, the cells of N maps; convolutions run in its dtype.
        layers: the three convolutions with their norms.
        size: (H, W).
        recompute: remember nothing but x.
    Returns:
        `Tensor[N * H * W, C]`, and the statistics of the norms in order.
    Raises:
        ValueError: there are no cells.
    """
    return _run(_Bottleneck, x, layers, size, recompute)


def widening(
    x: Tensor, layers: Sequence[ConvNorm], size: Sequence[int], recompute: bool = False, shortcut_relu: bool = False
) -> tuple[Tensor, list[Statistics]]:
    """relu(norm(conv(relu(norm(conv(x))))) + norm(shortcut(x))) in training.

    Args:
        x: `Tensor[N * H * W, C]`; convolutions run in its dtype.
        layers: the residual branch's two convolutions and the shortcut's, with their norms.
        size: (H, W).
        recompute: remember nothing but x.
        shortcut_relu: ReLU after the shortcut too.
    Returns:
        `Tensor[N * H * W, out]`, and the statistics of the norms in order.
    Raises:
        ValueError: there are no cells.
    """
    return _run(_WideningReLU if shortcut_relu else _Widening, x, layers, size, recompute)


def _run(kind: type[_Kind], x: Tensor, layers: Sequence[ConvNorm], size: Sequence[int], recompute: bool):
    check_rows(x)
    parameters = [tensor for layer in layers for tensor in layer[:3]]
    step = _Step(kind, size, [layer.eps for layer in layers], recompute, [])
    return _Block.apply(x, step, *parameters), step.statistics


class _Step(NamedTuple):
    """What a block's forward and backward share besides tensors."""

    kind: type[_Kind]
    size: Sequence[int]
    eps: list[float]
    recompute: bool
    statistics: list[Statistics]
    """Filled by the forward."""


class _Call(NamedTuple):
    """The tensors of a block's forward."""

    x: Tensor
    convs: Sequence[Tensor]
    norms: list[Norm]
    size: Sequence[int]


class _Kind:
    """A kind of block: its forward, and the gradients of its input and of each convolution and norm in order."""

    inner: int
    """How many maps of the inside its backward takes."""

    @staticmethod
    def forward(call: _Call) -> tuple[Tensor, list[Tensor], list[Statistics]]:
        """The result, the maps of the inside, the statistics."""
        raise NotImplementedError

    @staticmethod
    def again(call: _Call, statistics: list[Statistics]) -> list[Tensor]:
        """The maps of the inside, computed again."""
        raise NotImplementedError

    @staticmethod
    def backward(
        call: _Call, grad: Tensor, y: Tensor | None, inner: list[Tensor], statistics: list[Statistics],
        wanted: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """`y`: the result; None: to be computed again.  `wanted`: of x, then of each parameter."""
        raise NotImplementedError


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, step: _Step, *parameters: Tensor) -> Tensor:
        weights, biases = parameters[1::3], parameters[2::3]
        with without_layers():
            convs = [kernel_of(conv, x.dtype) for conv in parameters[::3]]
            norms = [Norm(*parts) for parts in zip(weights, biases, step.eps, strict=True)]
            y, inner, statistics = step.kind.forward(_Call(x, convs, norms, step.size))
        step.statistics.extend(statistics)
        ctx.step, ctx.shapes = step, [conv.shape for conv in parameters[::3]]
        kept = () if step.recompute else (y, *inner)
        ctx.save_for_backward(x, *convs, *weights, *biases, *(part for pair in statistics for part in pair), *kept)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        step: _Step = ctx.step
        x, *saved = ctx.saved_tensors
        convs, weights, biases, kept = saved[:3], saved[3:6], saved[6:9], saved[15:]
        statistics = [Statistics(*saved[index : index + 2]) for index in (9, 11, 13)]
        wanted = ctx.needs_input_grad[:1] + ctx.needs_input_grad[2:]
        with without_layers():
            norms = [Norm(*parts) for parts in zip(weights, biases, step.eps, strict=True)]
            call = _Call(x, convs, norms, step.size)
            y, *inner = kept if kept else (None, *step.kind.again(call, statistics))
            del saved, kept
            grad_x, *grads = step.kind.backward(call, grad, y, inner, statistics, wanted)
            for index, shape in enumerate(ctx.shapes):
                if grads[3 * index] is not None:
                    grads[3 * index] = grads[3 * index].view(shape)
        return grad_x, None, *grads


class _Bottleneck(_Kind):
    @staticmethod
    def forward(call):
        (x, convs, norms, size) = call
        first = convolve(x, convs[0], None, size)
        normed, of_first = normalize(first, norms[0])
        second = convolve(normed, convs[1], None, size)
        normed, of_second = normalize(second, norms[1])
        y, of_third = normalize(convolve(normed, convs[2], None, size), norms[2], x)
        return y, [first, second], [of_first, of_second, of_third]

    @staticmethod
    def again(call, statistics):
        (x, convs, norms, size) = call
        first = convolve(x, convs[0], None, size)
        normed = normalize_again(first, norms[0], statistics[0])
        return [first, convolve(normed, convs[1], None, size)]

    @staticmethod
    def backward(call, grad, y, inner, statistics, wanted):
        (x, convs, norms, size), (first, second) = call, inner
        normed = normalize_again(second, norms[1], statistics[1])
        third = convolve(normed, convs[2], None, size)
        if y is None:
            y = normalize_again(third, norms[2], statistics[2], x)
        grad, *of_norm3, grad_x = normalize_backward(grad, third, y, norms[2], statistics[2], residual=wanted[0])
        del third, y
        grad, of_conv3 = convolve_backward(grad, normed, convs[2], size, of_weight=wanted[7])
        grad, *of_norm2, _ = normalize_backward(grad, second, normed, norms[1], statistics[1])
        normed = normalize_again(first, norms[0], statistics[0])
        grad, of_conv2 = convolve_backward(grad, normed, convs[1], size, of_weight=wanted[4])
        grad, *of_norm1, _ = normalize_backward(grad, first, normed, norms[0], statistics[0])
        grad_x, of_conv1 = convolve_backward(
            grad, x, convs[0], size, add_to=grad_x, of_rows=wanted[0], of_weight=wanted[1]
        )
        return grad_x, of_conv1, *of_norm1, of_conv2, *of_norm2, of_conv3, *of_norm3


class _Widening(_Kind):
    shortcut_relu = False

    @classmethod
    def forward(cls, call):
        (x, convs, norms, size) = call
        first = convolve(x, convs[0], None, size)
        normed, of_first = normalize(first, norms[0])
        shortcut, of_short = normalize(convolve(x, convs[2], None, size), norms[2], relu=cls.shortcut_relu)
        y, of_second = normalize(convolve(normed, convs[1], None, size), norms[1], shortcut)
        return y, [first], [of_first, of_second, of_short]

    @staticmethod
    def again(call, statistics):
        return [convolve(call.x, call.convs[0], None, call.size)]

    @classmethod
    def backward(cls, call, grad, y, inner, statistics, wanted):
        (x, convs, norms, size), (first,) = call, inner
        normed = normalize_again(first, norms[0], statistics[0])
        second = convolve(normed, convs[1], None, size)
        short = shortcut = None
        if y is None or cls.shortcut_relu:
            short = convolve(x, convs[2], None, size)
            shortcut = normalize_again(short, norms[2], statistics[2], relu=cls.shortcut_relu)
        if y is None:
            y = normalize_again(second, norms[1], statistics[1], shortcut)
        grad, *of_norm2, grad_short = normalize_backward(grad, second, y, norms[1], statistics[1], residual=True)
        del second, y
        grad, of_conv2 = convolve_backward(grad, normed, convs[1], size, of_weight=wanted[4])
        grad, *of_norm1, _ = normalize_backward(grad, first, normed, norms[0], statistics[0])
        grad_x, of_conv1 = convolve_backward(grad, x, convs[0], size, of_rows=wanted[0], of_weight=wanted[1])
        short = convolve(x, convs[2], None, size) if short is None else short
        grad, *of_norm3, _ = normalize_backward(
            grad_short, short, shortcut if cls.shortcut_relu else None, norms[2], statistics[2]
        )
        grad_x, of_conv3 = convolve_backward(
            grad, x, convs[2], size, add_to=grad_x, of_rows=wanted[0], of_weight=wanted[7]
        )
        return grad_x, of_conv1, *of_norm1, of_conv2, *of_norm2, of_conv3, *of_norm3


class _WideningReLU(_Widening):
    shortcut_relu = True
