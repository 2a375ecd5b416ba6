"""What every tower offers, the fc-head's tower and the C4 baseline's; the conv-head's is in `conv_tower`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..ops import onednn
from . import folded
from .folding import FoldedWeights, has_inner_hooks, have_kinds, layer_dtype, needs_grad
from .layered import Layered, run_fc
from .products import Layer


@runtime_checkable
class Tower(Protocol):
    """A module from the pooled maps of N RoIs to one vector for each: `Tensor[N, C, S, S]` -> `Tensor[N, dim]`."""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The modules that turn a map into a map, in order; empty where the tower has none."""
        ...

    def forward(self, x: Tensor, count: Tensor | None = None) -> Tensor:
        """The vectors of the RoIs.

        Args:
            x: `Tensor[N, C, S, S]`.
            count: `Tensor[]` int64: only the first `count` RoIs matter, and the rows of the rest may hold anything.
                None: all.
        """
        ...

    def can_skip(self, x: Tensor) -> bool:
        """Whether `forward` saves the work for the RoIs behind `count`, on inputs like `x`."""
        ...

    def plain(self) -> Tower:
        """Change the tower, in place, to run without fused operators; returns it."""
        ...

    def held_tensors(self) -> list[Tensor]:
        """Folded weights that the last call has read; `forward` replaces them when the weights change.

        A CUDA graph goes on reading those it was recorded with, so whoever records one keeps them alive.
        """
        ...


class FCTower(nn.Sequential):
    """Two fully connected layers: `Tensor[N, C, S, S]` -> `Tensor[N, dim]`.

    At inference without gradients a channels-last map is used as it lies: not the map is reordered but, once, the
    columns of the first weight.  In float32 on a CPU the products are oneDNN's (`ops.onednn.linear`).  Hooks on the
    layers, or others in their place, make it run them one by one.
    """

    layered: Layered | None = None
    """How layers run that have a precision of their own; None: both in that of the input."""

    def __init__(self, channels: int, size: int, dim: int) -> None:
        layers = nn.Linear(channels * size * size, dim), nn.Linear(dim, dim)
        for layer in layers:
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
        super().__init__(nn.Flatten(), layers[0], nn.ReLU(), layers[1], nn.ReLU())
        self._folded = FoldedWeights()

    @property
    def blocks(self) -> list[nn.Module]:
        """None: the first layer makes vectors of the maps."""
        return []

    def forward(self, x: Tensor, count: Tensor | None = None) -> Tensor:
        """As `Tower`; all RoIs are computed, whatever `count`."""
        separate = needs_grad(self, x) or has_inner_hooks(self) or not have_kinds(list(self), "flrlr")
        if self.layered is not None and not self.training and not separate and self.layered.runs(x):
            if products := self.layered.products(self, self.layers(x.shape[1:]), layer_dtype(x)):
                return run_fc(x, products)
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        parameters = list(self.parameters())
        packs = onednn.serves(x, parameters) and layer_dtype(x) == x.dtype
        if separate or not (last or packs):
            return super().forward(x)
        dtype = layer_dtype(x)
        if torch.compiler.is_compiling():  # part of the graph; torch 2.11 does not trace the lambda below
            weights = self._fold(dtype, x.shape[1:])
        else:
            # The layout of packed weights follows from the number of threads.
            kind = (dtype, x.shape[1:], last, torch.get_num_threads() if packs else None)
            weights = self._folded.get(parameters, kind, lambda: self._fold(dtype, x.shape[1:], last, packs))
        cells = (x.to(dtype).permute(0, 2, 3, 1) if last else x).flatten(1)
        if packs:
            first, second = weights
            return onednn.linear(onednn.linear(cells, first, relu=True), second, relu=True)
        weight1, bias1, weight2, bias2 = weights
        return linear(linear(cells, weight1, bias1).relu_(), weight2, bias2).relu_()

    def can_skip(self, x: Tensor) -> bool:
        return False

    def plain(self) -> FCTower:
        """Nothing to change: there are no fused operators."""
        return self

    def held_tensors(self) -> list[Tensor]:
        return self._folded.tensors()

    def train(self, mode: bool = True) -> FCTower:
        self._folded.forget()
        if self.layered is not None:
            self.layered.forget()
        return super().train(mode)

    def layers(self, shape: torch.Size | None = None) -> list[Layer]:
        """The layers that can have a precision of their own; none where one is of another type.

        `shape`: of a RoI's map, `[C, S, S]`, for the weights.
        """
        if any(type(self[index]) is not nn.Linear for index in (1, 3)):
            return []

        def as_convolution(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            return weight[:, :, None, None], bias

        return [
            Layer("1", True, lambda: as_convolution(*self._by_cells(shape))),
            Layer("3", False, lambda: as_convolution(self[3].weight, self[3].bias)),
        ]

    def _fold(self, dtype: torch.dtype, shape: torch.Size, last: bool = True, packs: bool = False) -> list:
        """Weights and biases; with `last` for maps that lie channels-last, with `packs` for `onednn.linear`."""
        weight, bias = self._by_cells(shape) if last else (self[1].weight, self[1].bias)
        tensors = [tensor.to(dtype) for tensor in (weight, bias, self[3].weight, self[3].bias)]
        return [onednn.pack_linear(*tensors[:2]), onednn.pack_linear(*tensors[2:])] if packs else tensors

    def _by_cells(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Weight and bias of the first layer, for channels-last maps of the shape `[C, S, S]`."""
        first = self[1]
        return first.weight.unflatten(1, shape).permute(0, 2, 3, 1).flatten(1), first.bias


class Conv5Tower(nn.Sequential):
    """A ResNet's last stage and the average over cells: `Tensor[N, C, S, S]` -> `Tensor[N, 2 C]`."""

    def __init__(self, conv5: nn.Module) -> None:
        super().__init__(conv5, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    @property
    def blocks(self) -> list[nn.Module]:
        """The stage, which is one module."""
        return [self[0]]

    def forward(self, x: Tensor, count: Tensor | None = None) -> Tensor:
        """As `Tower`; all RoIs are computed, whatever `count`."""
        maps = folded.sequence(self, [self[0]], x)
        if maps is None:
            return super().forward(x)
        for layer in list(self)[1:]:
            maps = layer(maps)
        return maps

    def train(self, mode: bool = True) -> Conv5Tower:
        folded.forget(self)
        return super().train(mode)

    def can_skip(self, x: Tensor) -> bool:
        return False

    def plain(self) -> Conv5Tower:
        """Nothing to change: there are no fused operators."""
        return self

    def held_tensors(self) -> list[Tensor]:
        """None: the weights are used as they are."""
        return []
