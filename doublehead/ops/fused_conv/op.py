"""Fused convolution of RoI maps: the function and the operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import check_count, check_same_dtype, check_shape, check_tensor
from .._library import define, define_autograd, define_cpu_kernel, define_triton_kernel
from . import reference
from .arguments import FusedConvArguments


def fused_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    size: Sequence[int],
    second: Tensor | None = None,
    residual: Tensor | None = None,
    count: Tensor | None = None,
    relu: bool = False,
    mean: bool = False,
) -> Tensor:
    """act(conv([x, second]) + bias + residual) in one pass, for inference.

    Maps are given as rows, one a cell: a channels-last `Tensor[N, C, H, W]` is `Tensor[N * H * W, C]` without a copy.
    A 3x3 convolution gathers its nine neighbours as it reads; nothing is unfolded in memory.

    Args:
        x: `Tensor[N * H * W, C]`, float16, bfloat16, float32 or float64.
        weight: `Tensor[out, C]`, with `second` `Tensor[out, C + C2]`; or `Tensor[out, C, 3, 3]`, padded by one.
        bias: `Tensor[out]` or None.
        size: (H, W) of the maps.
        second: `Tensor[N * H * W, C2]`: further input channels, as if concatenated to x.  Only 1x1.
        residual: `Tensor[N * H * W, out]`, added before ReLU.
        count: `Tensor[]` int64 on the device: maps from this one on are skipped, and zero in the result.
        relu: take ReLU.
        mean: return the average of each map's cells.

    Returns:
        `Tensor[N * H * W, out]`, or with `mean` `Tensor[N, out]`, in the dtype of x.

    Raises:
        TypeError: not a tensor, or dtypes differ.
        ValueError: a shape does not fit.
        RuntimeError: in the backward: there is no gradient.

    Source: the layers of Wu et al. 2020, Figure 5, with batch norms folded.
    """
    _check(x, weight, bias, size, second, residual, count)
    return _op(x, weight, bias, second, residual, count, list(size), relu, mean)


def _check(x, weight, bias, size, second, residual, count) -> None:
    check_tensor("x", x, "a Tensor[N * H * W, C]")
    check_tensor("weight", weight, "a Tensor[out, C] or Tensor[out, C, 3, 3]")
    for name, tensor in (("bias", bias), ("second", second), ("residual", residual), ("count", count)):
        if tensor is not None:
            check_tensor(name, tensor, "a tensor or None")
    if x.dim() != 2 or len(size) != 2 or min(size) < 1 or x.shape[0] % (size[0] * size[1]):
        raise ValueError(f"x must have shape [N * H * W, C] with H, W = size, got {list(x.shape)} and {list(size)}")
    channels = x.shape[1] + (0 if second is None else second.shape[1])
    kernel = tuple(weight.shape[2:])
    if weight.shape[1:2] != (channels,) or kernel not in ((), (3, 3)) or (kernel and second is not None):
        raise ValueError(
            f"weight must have shape [out, {channels}], or without second [out, {channels}, 3, 3], "
            f"got {list(weight.shape)}"
        )
    rows, out = x.shape[0], weight.shape[0]
    if bias is not None:
        check_shape("bias", bias, (out,))
    if second is not None:
        check_shape("second", second, (rows, channels - x.shape[1]))
    if residual is not None:
        check_shape("residual", residual, (rows, out))
    for name, tensor in (("weight", weight), ("bias", bias), ("second", second), ("residual", residual)):
        if tensor is not None:
            check_same_dtype(name, tensor, "x", x)
    check_count(count)


def _fake(conv: FusedConvArguments):
    number, outputs = conv.x.shape[0], conv.weight.shape[0]
    return conv.x.new_empty((number // (conv.size[0] * conv.size[1]) if conv.mean else number, outputs))


_op = define(
    "fused_conv(Tensor x, Tensor weight, Tensor? bias, Tensor? second, Tensor? residual, Tensor? count, int[] size, "
    "bool relu, bool mean) -> Tensor",
    reference=reference.fused_conv,
    fake=_fake,
    pack=lambda *arguments: (FusedConvArguments(*arguments),),
)


def _no_gradient(ctx, grad):
    raise RuntimeError("fused_conv has no gradient: it is for inference, with batch norms folded into its weights")


def _cpu(conv: FusedConvArguments) -> Tensor:
    if conv.weight.dim() == 4 or conv.second is not None or conv.residual is None or conv.count is not None:
        return reference.fused_conv(conv)
    y = torch.addmm(conv.residual, conv.x, conv.weight.t())  # the sum costs no pass of its own
    y = y if conv.bias is None else y.add_(conv.bias)
    y = y.relu_() if conv.relu else y
    cells = conv.size[0] * conv.size[1]
    return y.view(len(y) // cells, cells, y.shape[1]).mean(1) if conv.mean else y


define_cpu_kernel("fused_conv", _cpu)
define_autograd("fused_conv", _no_gradient, lambda ctx, inputs, output: None)
define_triton_kernel("fused_conv", "doublehead.ops.fused_conv.kernel", "fused_conv")
