"""A convolution with the batch norm, the sum and the ReLU that follow it, in one kernel where PyTorch has one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from ...ops import onednn, winograd


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

    def is_fused(self, dtype: torch.dtype) -> bool:
        """Whether it runs in one kernel."""
        return self.dilation == (1, 1) and self.groups == 1 and onednn.is_available(dtype)

    def may_transform(self, x: Tensor) -> bool:
        """Whether it may run by Winograd's method, if it runs in one kernel."""
        square = self.kernel == (3, 3) and self.stride == self.padding == (1, 1)
        return square and winograd.pays(x.shape, self.outputs, x.dtype)


class Weights:
    """A layer's tensors, folded, in the dtype that it runs in.

    Args:
        weight, bias: channels-last, not packed.
        fused: whether the layer runs in one kernel.
        sizes: for how many sizes of maps the packed weight is kept: as many as a network is called on at a time.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, fused: bool, sizes: int) -> None:
        self.weight, self.bias, self.fused = weight, bias, fused
        self._sizes = sizes
        self._packed: dict[tuple[torch.Size, int], Tensor] = {}
        self._transformed: Tensor | None = None

    def is_finite(self) -> bool:
        tensors = [self.weight] if self.bias is None else [self.weight, self.bias]
        return all(bool(tensor.isfinite().all()) for tensor in tensors)

    def packed(self, layer: Layer, x: Tensor) -> Tensor:
        """The weight as oneDNN prefers it for maps of the size of `x`, on this many threads."""
        key = (x.shape, torch.get_num_threads())
        packed = self._packed.get(key)
        if packed is None:
            with torch.inference_mode(False):
                packed = onednn.pack(self.weight, layer.stride, layer.padding, x.shape)
            oldest = list(self._packed)[: max(len(self._packed) + 1 - self._sizes, 0)]  # threads share the weights
            for other in oldest:
                self._packed.pop(other, None)
            self._packed[key] = packed
        return packed

    def transformed(self) -> Tensor:
        """The weight for Winograd's method, for maps of any size."""
        if self._transformed is None:
            with torch.inference_mode(False):
                self._transformed = winograd.pack(self.weight)
        return self._transformed


def fold(layer: Layer, conv: nn.Module, norm: nn.Module | None, dtype: torch.dtype, sizes: int) -> Weights:
    """Fold the norm in float64 and round once; `conv` is anything with a weight and a bias."""
    weight, bias = conv.weight.double(), None if conv.bias is None else conv.bias.double()
    if norm is not None:
        scale = torch.rsqrt(norm.running_var.double() + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        bias = -norm.running_mean.double() * scale if bias is None else (bias - norm.running_mean.double()) * scale
        if norm.bias is not None:
            bias = bias + norm.bias.double()
        weight = weight * scale.view(-1, 1, 1, 1)
    weight = weight.to(dtype, memory_format=torch.channels_last)
    bias = None if bias is None else bias.to(dtype)
    return Weights(weight, bias, layer.is_fused(dtype), sizes)


def convolve(layer: Layer, weights: Weights, x: Tensor) -> Tensor:
    """`Tensor[N, I, H, W]`, channels-last -> `Tensor[N, O, H', W']`, channels-last, new memory."""
    if weights.fused and layer.may_transform(x):
        return winograd.convolution(x, weights.transformed(), weights.bias, layer.outputs, relu=layer.relu)
    if weights.fused:
        return onednn.convolution(x, weights.packed(layer, x), weights.bias, layer.stride, layer.padding, layer.relu)
    y = _plain(layer, weights, x)
    return y.relu_() if layer.relu else y


def add_to(to: Tensor, layer: Layer, weights: Weights, x: Tensor) -> Tensor:
    """Add the convolution of `x` to `to`, then ReLU; in place but where it runs by Winograd's method."""
    if weights.fused and layer.may_transform(x):
        return winograd.convolution(x, weights.transformed(), weights.bias, layer.outputs, to, layer.relu)
    if weights.fused:
        return onednn.add_convolution(
            to, x, weights.packed(layer, x), weights.bias, layer.stride, layer.padding, layer.relu
        )
    if layer.kernel == layer.stride == (1, 1) and layer.padding == (0, 0) and layer.groups == 1:
        rows = to.permute(0, 2, 3, 1).view(-1, layer.outputs)  # a view: `to` is channels-last
        rows.addmm_(x.permute(0, 2, 3, 1).reshape(-1, layer.inputs), weights.weight.flatten(1).t())
        if weights.bias is not None:
            rows.add_(weights.bias)
    else:
        to.add_(_plain(layer, weights, x))
    return to.relu_() if layer.relu else to


def _plain(layer: Layer, weights: Weights, x: Tensor) -> Tensor:
    return conv2d(x, weights.weight, weights.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
