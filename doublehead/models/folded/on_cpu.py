"""Layers in oneDNN's kernels, and by Winograd's method where that pays."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...ops import onednn, winograd
from .layers import Layer, Weights


class OneDNNWeights(Weights):
    """Weights that are packed for the sizes of maps that a network is called on."""

    def __init__(self, layer: Layer, weight: Tensor, bias: Tensor | None, sizes: int) -> None:
        super().__init__(layer, weight, bias, sizes)
        self.fused = layer.dilation == (1, 1) and layer.groups == 1 and onednn.is_available(weight.dtype)
        self._sizes = sizes
        self._packed: dict[tuple[torch.Size, int], Tensor] = {}
        self._transformed: Tensor | None = None

    @staticmethod
    def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
        return onednn.is_available(dtype)

    @staticmethod
    def accept(maps: Sequence[Tensor]) -> bool:
        return all(bool(x.sum().isfinite()) for x in maps)

    def convolve(self, layer: Layer, x: Tensor) -> Tensor:
        if not self.fused:
            return super().convolve(layer, x)
        if _may_transform(layer, x):
            return winograd.convolution(x, self.transformed(), self.bias, layer.outputs, relu=layer.relu)
        return onednn.convolution(x, self.packed(layer, x), self.bias, layer.stride, layer.padding, layer.relu)

    def add_to(self, layer: Layer, to: Tensor, x: Tensor) -> Tensor:
        if not self.fused:
            return super().add_to(layer, to, x)
        if _may_transform(layer, x):
            return winograd.convolution(x, self.transformed(), self.bias, layer.outputs, to, layer.relu)
        return onednn.add_convolution(
            to, x, self.packed(layer, x), self.bias, layer.stride, layer.padding, layer.relu
        )  # fmt: skip

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


def _may_transform(layer: Layer, x: Tensor) -> bool:
    """Whether the layer may run by Winograd's method, if it runs in one kernel."""
    square = layer.kernel == (3, 3) and layer.stride == layer.padding == (1, 1)
    return square and winograd.pays(x.shape, layer.outputs, x.dtype)
