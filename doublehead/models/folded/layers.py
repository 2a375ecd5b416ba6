"""A convolution with the batch norm, the sum and the ReLU that follow it, by PyTorch's own operators.

`on_cpu` and `on_cuda` run the same layers in one kernel each, where there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, interpolate


class Layer(NamedTuple):
    """All of a convolution but its tensors; layers of the same plan are told apart by `index`."""

    index: int
    inputs: int
    outputs: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    eps: float | None
    """Of the norm that is folded in; None: there is none."""
    relu: bool

    @property
    def is_product(self) -> bool:
        """Whether it is a matrix product of the map's cells."""
        return self.kernel == self.stride == (1, 1) and self.padding == (0, 0) and self.groups == 1


class Weights:
    """A layer's tensors, folded, and how a layer with them runs: here by PyTorch's own operators.

    An engine is a class of these: what it needs beside the tensors is made when they are.

    Args:
        layer: that they belong to.
        weight, bias: channels-last, in the dtype that the layer runs in.
        sizes: on how many sizes of maps the network is called at a time.
    """

    fused = False
    """Whether the layer may run in one kernel."""
    adds_in_place = True
    """Whether `add_to` may write into the map that it adds to."""

    def __init__(self, layer: Layer, weight: Tensor, bias: Tensor | None, sizes: int) -> None:
        self.weight, self.bias = weight, bias

    @staticmethod
    def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
        """Whether layers can run in one kernel on this device, as PyTorch is set up now."""
        return False

    @staticmethod
    def accept(maps: Sequence[Tensor]) -> bool:
        """Whether these maps may go through kernels whose ReLU makes 0 of NaN."""
        return True

    @staticmethod
    def enter(x: Tensor, dtype: torch.dtype) -> Tensor:
        """A map as the first layer takes it."""
        return x.to(dtype).contiguous(memory_format=torch.channels_last)

    def mark(self, x: Tensor, y: Tensor) -> Tensor:
        """`y`, a network's result, in which an image must be seen to be broken if it is in `x`, the input."""
        return y

    def convolve(self, layer: Layer, x: Tensor) -> Tensor:
        """`Tensor[N, I, H, W]`, channels-last -> `Tensor[N, O, H', W']`, channels-last, new memory."""
        y = self._plain(layer, x)
        return y.relu_() if layer.relu else y

    def add_to(self, layer: Layer, to: Tensor, x: Tensor) -> Tensor:
        """The convolution of `x` added to `to`, then ReLU; see `adds_in_place`."""
        if layer.is_product:
            rows = to.permute(0, 2, 3, 1).view(-1, layer.outputs)  # a view: `to` is channels-last
            rows.addmm_(x.permute(0, 2, 3, 1).reshape(-1, layer.inputs), self.weight.flatten(1).t())
            if self.bias is not None:
                rows.add_(self.bias)
        else:
            to.add_(self._plain(layer, x))
        return to.relu_() if layer.relu else to

    def merge(self, layer: Layer, coarse: Tensor, x: Tensor) -> Tensor:
        """Add the convolution of `x` to `coarse`, enlarged to its size: a step down the pyramid."""
        return self.add_to(layer, interpolate(coarse, size=x.shape[-2:], mode="nearest"), x)

    def take_bias_of(self, other: Weights) -> None:
        """`other` is the shortcut to which this layer's result is added: one bias will do."""

    def parts(self, y: Tensor, channels: Sequence[int]) -> list[Tensor]:
        """The parts of a result, by channels, each in memory of its own.

        Readers take the maps as rows, which without a copy of each would be one in every reader.
        """
        return [part.contiguous(memory_format=torch.channels_last) for part in y.split(channels, 1)]

    def held_tensors(self) -> list[Tensor]:
        """What a call reads, for a caller that keeps it alive."""
        return [tensor for tensor in (self.weight, self.bias) if tensor is not None]

    def _plain(self, layer: Layer, x: Tensor) -> Tensor:
        return conv2d(x, self.weight, self.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def fold(layer: Layer, conv: nn.Module, norm: nn.Module | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weight and bias with the norm folded in, in float64, rounded once; `conv` is anything that has both."""
    weight, bias = conv.weight.double(), None if conv.bias is None else conv.bias.double()
    if norm is not None:
        scale = torch.rsqrt(norm.running_var.double() + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        bias = -norm.running_mean.double() * scale if bias is None else (bias - norm.running_mean.double()) * scale
        if norm.bias is not None:
            bias = bias + norm.bias.double()
        weight = weight * scale.view(-1, 1, 1, 1)
    return weight.to(dtype, memory_format=torch.channels_last), None if bias is None else bias.to(dtype)
