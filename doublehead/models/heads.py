"""The heads: which tower classifies, which regresses, and how deep each is (PAPER Figures 1 and 5)."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from torch import Tensor, nn

from ..config import HeadConfig, RoIConfig
from . import folded
from .conv_tower import ConvTower
from .readout import BRANCHES, Branch
from .structures import at_least_float32
from .towers import Conv5Tower, FCTower, Tower


class HeadOutput(NamedTuple):
    """What one head says of every RoI; None for a task it is not trained for."""

    logits: Tensor | None
    """`Tensor[N, classes]`, background first."""
    deltas: Tensor | None
    """`Tensor[N, classes, 4]`, encoded boxes of every class; of a class-agnostic regressor an expanded view of one."""


class Head(nn.Module):
    """A tower with a linear classifier, a linear box regressor (of each class, or of all), or both."""

    def __init__(
        self, branch: Branch, tower: Tower, dim: int, num_classes: int, class_agnostic_boxes: bool = False
    ) -> None:
        super().__init__()
        self.tower = tower
        self.num_classes, self.class_agnostic_boxes = num_classes, class_agnostic_boxes
        boxes = 1 if class_agnostic_boxes else num_classes
        self.classifier = _linear(dim, num_classes, std=0.01) if branch.classifies else None
        self.regressor = _linear(dim, 4 * boxes, std=0.001) if branch.regresses else None

    def forward(self, x: Tensor, count: Tensor | None = None) -> HeadOutput:
        """`Tensor[N, C, S, S]` -> logits and deltas, at least fp32.

        `count`: `Tensor[]` int64: only the first `count` RoIs matter (see `Tower`).  None: all.
        """
        vector = self.tower(x, count)
        layers = [layer for layer in (self.classifier, self.regressor) if layer is not None]
        outputs = folded.predictors(self, layers, vector)
        if outputs is None:
            outputs = [at_least_float32(layer(vector)) for layer in layers]
        logits = outputs[0] if self.classifier is not None else None
        if self.regressor is None:
            return HeadOutput(logits, None)
        deltas = outputs[-1].unflatten(1, (-1, 4))
        return HeadOutput(logits, deltas.expand(-1, self.num_classes, 4) if self.class_agnostic_boxes else deltas)


def build_head(
    branch: Branch,
    config: HeadConfig,
    roi: RoIConfig,
    channels: int,
    num_classes: int,
    conv5: nn.Module | None = None,
) -> Head:
    """One head with fresh weights; arguments as of `Heads`, whose kind is not looked at."""
    build = {
        "fc": lambda: (FCTower(channels, roi.output_size, config.fc_dim), config.fc_dim),
        "conv": lambda: (ConvTower(channels, config), config.conv_dim),
        "conv5": lambda: (Conv5Tower(conv5), 2 * channels),
    }
    return Head(branch, *build[branch.tower](), num_classes, config.class_agnostic_boxes)


def box_scale(branch: Branch, roi: RoIConfig) -> float:
    """By which factor the boxes are enlarged that a branch pools."""
    return {"fc": roi.fc_box_scale, "conv": roi.conv_box_scale, "conv5": 1.0}[branch.tower]


class Heads(nn.ModuleDict):
    """All heads of a kind; each sees the RoIs at its own box scale.

    Args:
        config: kind, widths, depth.
        roi: how RoIs are pooled.
        channels: width of the pooled maps.
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
        branches = BRANCHES[config.kind]
        super().__init__(
            {name: build_head(branch, config, roi, channels, num_classes, conv5) for name, branch in branches.items()}
        )
        self.box_scales = {name: box_scale(branch, roi) for name, branch in branches.items()}

    def forward(
        self, pooled: dict[float, Tensor], names: Collection[str] | None = None, count: Tensor | None = None
    ) -> dict[str, HeadOutput]:
        """Box scale -> `Tensor[N, C, S, S]` becomes branch name -> `HeadOutput`.

        `names`: the branches to run; None: all.  `count`: as in `Head`.
        """
        run = [name for name in self if names is None or name in names]
        return {name: self[name](pooled[self.box_scales[name]], count) for name in run}


def _linear(inputs: int, outputs: int, std: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer
