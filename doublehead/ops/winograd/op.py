"""Winograd's convolution: the functions and the operator."""

from __future__ import annotations

from torch import Tensor

from .._library import define, define_autograd
from . import reference

_winograd = define(
    "winograd(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int outputs, bool relu) -> Tensor",
    reference=reference.winograd,
    fake=lambda x, weight, bias, residual, outputs, relu: x.new_empty((*x.shape[:3], outputs)),
    cpu_only=True,
)


def _backward(ctx, grad):
    raise RuntimeError("torch.ops.doublehead.winograd has no gradient: it is for inference")


define_autograd("winograd", _backward, lambda ctx, inputs, output: None)


def pack(weight: Tensor) -> Tensor:
    """The weights of a 3x3 convolution for `convolution`.

    Args:
        weight: `Tensor[O, I, 3, 3]`, float32.

    Returns:
        `Tensor[36, ceil(O / 16), I, 16]`, four times the weight's memory.
    """
    return reference.pack(weight)


def convolution(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    outputs: int,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Convolution of stride 1 and padding 1, bias, sum and ReLU: `Tensor[N, I, H, W]` -> `Tensor[N, O, H, W]`.

    A value of a tile that is not finite makes all outputs of the tile NaN or infinite, also those that it is no input
    of; ReLU keeps NaN.

    Args:
        x: channels-last (other formats are copied), float32, on the CPU.
        packed: from `pack`.
        bias: `Tensor[O]`, or None.
        outputs: O.
        residual: `Tensor[N, O, H, W]`, channels-last, which is added, or None.

    Returns:
        channels-last, new memory.
    """
    residual = None if residual is None else residual.permute(0, 2, 3, 1).contiguous()
    return _winograd(x.permute(0, 2, 3, 1).contiguous(), packed, bias, residual, outputs, relu).permute(0, 3, 1, 2)
