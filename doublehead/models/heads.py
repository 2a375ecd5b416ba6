"""The heads: which tower classifies, which regresses, and how deep each is (PAPER Figures 1 and 5)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..config import HeadConfig, HeadKind, RoIConfig
from .conv_tower import ConvTower
from .folding import FoldedWeights, layer_dtype
from .structures import at_least_float32


class Branch(NamedTuple):
    """One head of a kind: its tower, and the tasks it is trained for."""

    tower: Literal["fc", "conv", "conv5"]
    classifies: bool
    regresses: bool


BRANCHES: dict[HeadKind, dict[str, Branch]] = {
    "fc": {"fc": Branch("fc", True, True)},
    "conv": {"conv": Branch("conv", True, True)},
    "double_fc": {"fc_1": Branch("fc", True, False), "fc_2": Branch("fc", False, True)},
    "double_conv": {"conv_1": Branch("conv", True, False), "conv_2": Branch("conv", False, True)},
    "double_head": {"fc": Branch("fc", True, False), "conv": Branch("conv", False, True)},
    "double_head_reverse": {"fc": Branch("fc", False, True), "conv": Branch("conv", True, False)},
    "double_head_ext": {"fc": Branch("fc", True, True), "conv": Branch("conv", True, True)},
    "conv5": {"conv5": Branch("conv5", True, True)},
}
"""Branch name -> branch, for every kind of PAPER Table 1, Ext, and the C4 baseline of Table 4."""


class HeadOutput(NamedTuple):
    """What one head says of every RoI; None for a task it is not trained for."""

    logits: Tensor | None
    """`Tensor[N, classes]`, background first."""
    deltas: Tensor | None
    """`Tensor[N, classes, 4]`, encoded boxes of every class; of a class-agnostic regressor an expanded view of one."""


class FCTower(nn.Sequential):
    """Two fully connected layers: `Tensor[N, C, S, S]` -> `Tensor[N, dim]`.

    At inference without gradients a channels-last map is used as it lies: not the map is reordered but, once, the
    columns of the first weight.
    """

    def __init__(self, channels: int, size: int, dim: int) -> None:
        layers = nn.Linear(channels * size * size, dim), nn.Linear(dim, dim)
        for layer in layers:
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
        super().__init__(nn.Flatten(), layers[0], nn.ReLU(), layers[1], nn.ReLU())
        self._folded = FoldedWeights()

    def forward(self, x: Tensor) -> Tensor:
        needs_grad = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
        if needs_grad or not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)
        dtype = layer_dtype(x)
        if torch.compiler.is_compiling():  # part of the graph; torch 2.11 does not trace the lambda below
            folded = self._fold(dtype, x.shape[1:])
        else:
            kind = (dtype, x.shape[1:])
            folded = self._folded.get(self.parameters(), kind, lambda: self._fold(dtype, x.shape[1:]))
        weight1, bias1, weight2, bias2 = folded
        cells = x.to(dtype).permute(0, 2, 3, 1).flatten(1)
        return linear(linear(cells, weight1, bias1).relu_(), weight2, bias2).relu_()

    def train(self, mode: bool = True) -> FCTower:
        self._folded.forget()
        return super().train(mode)

    def _fold(self, dtype: torch.dtype, shape: torch.Size) -> list[Tensor]:
        first, second = self[1], self[3]
        weight = first.weight.unflatten(1, shape).permute(0, 2, 3, 1).flatten(1)
        return [tensor.to(dtype) for tensor in (weight, first.bias, second.weight, second.bias)]


class Conv5Tower(nn.Sequential):
    """A ResNet's last stage and the average over cells: `Tensor[N, C, S, S]` -> `Tensor[N, 2 C]`."""

    def __init__(self, conv5: nn.Module) -> None:
        super().__init__(conv5, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Head(nn.Module):
    """A tower with a linear classifier, a linear box regressor (of each class, or of all), or both."""

    def __init__(
        self, branch: Branch, tower: nn.Module, dim: int, num_classes: int, class_agnostic_boxes: bool = False
    ) -> None:
        super().__init__()
        self.tower = tower
        self.num_classes, self.class_agnostic_boxes = num_classes, class_agnostic_boxes
        boxes = 1 if class_agnostic_boxes else num_classes
        self.classifier = _linear(dim, num_classes, std=0.01) if branch.classifies else None
        self.regressor = _linear(dim, 4 * boxes, std=0.001) if branch.regresses else None

    def forward(self, x: Tensor, count: Tensor | None = None) -> HeadOutput:
        """`Tensor[N, C, S, S]` -> logits and deltas, at least fp32.

        `count`: `Tensor[]` int64: only the first `count` RoIs matter; a conv tower may leave out the rest.  None: all.
        """
        vector = self.tower(x, count) if isinstance(self.tower, ConvTower) else self.tower(x)
        logits = at_least_float32(self.classifier(vector)) if self.classifier is not None else None
        if self.regressor is None:
            return HeadOutput(logits, None)
        deltas = at_least_float32(self.regressor(vector)).unflatten(1, (-1, 4))
        return HeadOutput(logits, deltas.expand(-1, self.num_classes, 4) if self.class_agnostic_boxes else deltas)


class Heads(nn.ModuleDict):
    """All heads of a kind; each sees the RoIs at its own box scale.

    Args:
        config: kind, widths, depth.
        roi: how RoIs are pooled.
        channels: of the pooled maps.
        num_classes: classes with background.
        conv5: the ResNet's last stage, where the backbone has no pyramid.

    Raises:
        ValueError: an unknown kind, or one that does not go with the backbone.
    """

    def __init__(
        self, config: HeadConfig, roi: RoIConfig, channels: int, num_classes: int, conv5: nn.Module | None = None
    ) -> None:
        if config.kind not in BRANCHES:
            raise ValueError(f"head.kind: expected one of {', '.join(BRANCHES)}, got {config.kind!r}")
        if (config.kind == "conv5") != (conv5 is not None):
            raise ValueError(f"head.kind: 'conv5' and backbone.neck 'none' need each other, got kind {config.kind!r}")
        build = {
            "fc": lambda: (FCTower(channels, roi.output_size, config.fc_dim), config.fc_dim),
            "conv": lambda: (ConvTower(channels, config), config.conv_dim),
            "conv5": lambda: (Conv5Tower(conv5), 2 * channels),
        }
        branches = BRANCHES[config.kind]
        super().__init__(
            {
                name: Head(branch, *build[branch.tower](), num_classes, config.class_agnostic_boxes)
                for name, branch in branches.items()
            }
        )
        scale_of = {"fc": roi.fc_box_scale, "conv": roi.conv_box_scale, "conv5": 1.0}
        self.box_scales = {name: scale_of[branch.tower] for name, branch in branches.items()}

    def forward(
        self, pooled: dict[float, Tensor], names: Collection[str] | None = None, count: Tensor | None = None
    ) -> dict[str, HeadOutput]:
        """Box scale -> `Tensor[N, C, S, S]` becomes branch name -> `HeadOutput`.

        `names`: of the branches to run; None: all.  `count`: as in `Head`.
        """
        run = [name for name in self if names is None or name in names]
        return {name: self[name](pooled[self.box_scales[name]], count) for name in run}


def _linear(inputs: int, outputs: int, std: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer
