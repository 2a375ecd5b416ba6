"""Layers in cuDNN's kernels, and matrix products of cells in cuBLAS's: nothing is read back, and nothing waits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...ops import cublas, cudnn
from .layers import Layer, Weights
from .stem import blocks_of, has_blocks, padding_of_blocks, weight_of_blocks


class CudnnWeights(Weights):
    """Weights whose channels are padded with zeros where cuDNN's and cuBLAS's kernels want multiples of 16 bytes."""

    adds_in_place = False

    def __init__(self, layer: Layer, weight: Tensor, bias: Tensor | None, sizes: int) -> None:
        super().__init__(layer, weight, bias, sizes)
        self._hides_nan = self.has_kernels(weight.device, weight.dtype)  # this layer may not, but others will
        self.fused = layer.dilation == (1, 1) and layer.groups == 1 and self._hides_nan
        multiplies = layer.is_product and not layer.relu and cublas.is_available(weight.device, weight.dtype)
        self._multiplies = self.fused and multiplies
        self._blocks: Tensor | None = None
        if not self.fused:
            return
        if layer.relu or self._multiplies:
            self.bias = weight.new_zeros(layer.outputs) if bias is None else bias
        step = cudnn.channel_step(weight.dtype)
        if layer.relu and layer.inputs % step and has_blocks(layer):
            self._blocks = weight_of_blocks(weight, step)
        if layer.relu:
            weight = _pad_rows(weight.transpose(0, 1), step).transpose(0, 1)
        elif self._multiplies:
            weight, self.bias = _pad_rows(weight, step), _pad_rows(self.bias, step)
        self.weight = weight.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
        return cudnn.is_available(device, dtype)

    @staticmethod
    def enter(x: Tensor, dtype: torch.dtype) -> Tensor:
        return x  # the first layer pads, converts and reorders it at once

    def mark(self, x: Tensor, y: Tensor) -> Tensor:
        """NaN in all of an image's `y` if there is NaN or infinity in its `x`: ReLU may have made 0 of it.

        `y` is changed in place.
        """
        if not self._hides_nan:
            return y
        broken = x.sum((1, 2, 3), dtype=torch.float32).mul_(0)
        return y.add_(broken.view(-1, 1, 1, 1))

    def convolve(self, layer: Layer, x: Tensor) -> Tensor:
        if self._blocks is not None and x.shape[2] % 2 == x.shape[3] % 2 == 0:
            x = blocks_of(x, self._blocks.shape[1], self.weight.dtype)
            return cudnn.convolution(x, self._blocks, self.bias, padding=padding_of_blocks(layer), relu=True)
        x = self._enter(layer, x)
        if self.fused and layer.relu:
            return cudnn.convolution(x, self.weight, self.bias, layer.stride, layer.padding, relu=True)
        return self._multiply(layer, x) if self._multiplies else super().convolve(layer, x)

    def add_to(self, layer: Layer, to: Tensor, x: Tensor) -> Tensor:
        x, to = self._enter(layer, x), _converted(to, self.weight.dtype)
        if self.fused and layer.relu:
            return cudnn.add_convolution(to, x, self.weight, self.bias, layer.stride, layer.padding, relu=True)
        y = self.convolve(layer._replace(relu=False), x).add_(to)
        return y.relu_() if layer.relu else y

    def merge(self, layer: Layer, coarse: Tensor, x: Tensor) -> Tensor:
        height, width = coarse.shape[-2:]
        if x.shape[-2:] != (2 * height, 2 * width):
            return super().merge(layer, coarse, x)
        y = self.convolve(layer, x)  # each cell of the coarse map is added to four, without a map of its enlarged copy
        y.unflatten(3, (width, 2)).unflatten(2, (height, 2)).add_(coarse[:, :, :, None, :, None])
        return y

    def take_bias_of(self, other: Weights) -> None:
        if self.fused and other.bias is not None and not other._multiplies:
            self.bias, other.bias = self.bias + other.bias, None

    def parts(self, y: Tensor, channels: Sequence[int]) -> list[Tensor]:
        """Views: readers convert the maps to float32, each in one pass, and that makes rows of them."""
        return list(y.split(channels, 1))

    def held_tensors(self) -> list[Tensor]:
        return [*super().held_tensors(), *([] if self._blocks is None else [self._blocks])]

    def _multiply(self, layer: Layer, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        rows = cublas.product(x.permute(0, 2, 3, 1).reshape(-1, layer.inputs), self.weight.flatten(1), self.bias)
        return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)[:, : layer.outputs]

    def _enter(self, layer: Layer, x: Tensor) -> Tensor:
        """`x` with the weight's dtype and channels."""
        missing = self.weight.shape[1] * layer.groups - x.shape[1]
        if not missing:
            return _converted(x, self.weight.dtype)
        batch, channels, height, width = x.shape
        wide = torch.empty(
            (batch, channels + missing, height, width),
            dtype=self.weight.dtype,
            device=x.device,
            memory_format=torch.channels_last,
        ).zero_()
        wide[:, :channels].copy_(x)
        return wide


def _converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype, memory_format=torch.channels_last).contiguous(memory_format=torch.channels_last)


def _pad_rows(x: Tensor, step: int) -> Tensor:
    """`x` with zeros behind, so that its length is a multiple of `step`."""
    missing = -len(x) % step
    return pad(x, (0, 0) * (x.dim() - 1) + (0, missing)) if missing else x
