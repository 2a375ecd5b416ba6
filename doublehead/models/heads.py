"""The heads: which tower classifies, which regresses, and how deep each is (PAPER Figures 1 and 5)."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor, nn

from ..config import HeadConfig, HeadKind, NonLocalConfig, RoIConfig
from ..ops import NonLocalBlock
from .structures import at_least_float32


class Branch(NamedTuple):
    """One head of a kind: its tower, and the tasks it is trained for."""

    tower: Literal["fc", "conv"]
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
}
"""Branch name -> branch, for every kind of PAPER Table 1 and Ext."""


class HeadOutput(NamedTuple):
    """What one head says of every RoI; None for a task it is not trained for."""

    logits: Tensor | None
    """`Tensor[N, classes]`, background first."""
    deltas: Tensor | None
    """`Tensor[N, classes, 4]`, encoded boxes of every class."""


class FCTower(nn.Sequential):
    """Two fully connected layers: `Tensor[N, C, S, S]` -> `Tensor[N, dim]`."""

    def __init__(self, channels: int, size: int, dim: int) -> None:
        layers = nn.Linear(channels * size * size, dim), nn.Linear(dim, dim)
        for layer in layers:
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
        super().__init__(nn.Flatten(), layers[0], nn.ReLU(), layers[1], nn.ReLU())


class WideningBlock(nn.Module):
    """The first residual block: 3x3 and 1x1 convolutions beside a 1x1 shortcut, to more channels.

    Args:
        channels: input width.
        dim: output width.
        shortcut_relu: ReLU after the shortcut too (MMDetection's form).
    """

    def __init__(self, channels: int, dim: int, shortcut_relu: bool = False) -> None:
        super().__init__()
        self.residual = nn.Sequential(*conv_norm(channels, channels, 3), nn.ReLU(), *conv_norm(channels, dim, 1))
        self.shortcut = nn.Sequential(*conv_norm(channels, dim, 1), *([nn.ReLU()] if shortcut_relu else []))

    def forward(self, x: Tensor) -> Tensor:
        return (self.residual(x) + self.shortcut(x)).relu()


class Bottleneck(nn.Module):
    """Residual bottleneck: 1x1 to a quarter of the channels, 3x3, 1x1 back (He et al. 2016)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = channels // 4
        self.residual = nn.Sequential(
            *conv_norm(channels, inner, 1), nn.ReLU(),
            *conv_norm(inner, inner, 3), nn.ReLU(),
            *conv_norm(inner, channels, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.residual(x)).relu()


class ConvTower(nn.Sequential):
    """K blocks and average pooling: `Tensor[N, C, S, S]` -> `Tensor[N, dim]`.

    With non-local blocks, K counts them too: one before each bottleneck.

    Raises:
        ValueError: K under 1, or an even K with non-local blocks.
    """

    def __init__(self, channels: int, config: HeadConfig) -> None:
        blocks, non_local = config.conv_blocks, config.non_local
        if blocks < 1:
            raise ValueError(f"head.conv_blocks: expected at least 1, got {blocks}")
        if non_local.enabled and blocks % 2 == 0:
            raise ValueError(f"head.conv_blocks: expected an odd number with non-local blocks, got {blocks}")
        layers: list[nn.Module] = [WideningBlock(channels, config.conv_dim, config.shortcut_relu)]
        for _ in range((blocks - 1) // 2 if non_local.enabled else blocks - 1):
            if non_local.enabled:
                layers.append(non_local_block(config.conv_dim, non_local))
            layers.append(Bottleneck(config.conv_dim))
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Head(nn.Module):
    """A tower with a linear classifier, a linear class-specific box regressor, or both."""

    def __init__(self, branch: Branch, config: HeadConfig, channels: int, size: int, num_classes: int) -> None:
        super().__init__()
        if branch.tower == "fc":
            self.tower, dim = FCTower(channels, size, config.fc_dim), config.fc_dim
        else:
            self.tower, dim = ConvTower(channels, config), config.conv_dim
        self.classifier = _linear(dim, num_classes, std=0.01) if branch.classifies else None
        self.regressor = _linear(dim, 4 * num_classes, std=0.001) if branch.regresses else None

    def forward(self, x: Tensor) -> HeadOutput:
        """`Tensor[N, C, S, S]` -> logits and deltas, at least fp32."""
        vector = self.tower(x)
        logits = at_least_float32(self.classifier(vector)) if self.classifier is not None else None
        deltas = at_least_float32(self.regressor(vector)).unflatten(1, (-1, 4)) if self.regressor is not None else None
        return HeadOutput(logits, deltas)


class Heads(nn.ModuleDict):
    """All heads of a kind; each sees the RoIs at its own box scale."""

    def __init__(self, config: HeadConfig, roi: RoIConfig, channels: int, num_classes: int) -> None:
        if config.kind not in BRANCHES:
            raise ValueError(f"head.kind: expected one of {', '.join(BRANCHES)}, got {config.kind!r}")
        branches = BRANCHES[config.kind]
        super().__init__(
            {name: Head(branch, config, channels, roi.output_size, num_classes) for name, branch in branches.items()}
        )
        scale_of = {"fc": roi.fc_box_scale, "conv": roi.conv_box_scale}
        self.box_scales = {name: scale_of[branch.tower] for name, branch in branches.items()}

    def forward(self, pooled: dict[float, Tensor]) -> dict[str, HeadOutput]:
        """Box scale -> `Tensor[N, C, S, S]` becomes branch name -> `HeadOutput`."""
        return {name: head(pooled[self.box_scales[name]]) for name, head in self.items()}


def conv_norm(inputs: int, outputs: int, kernel: int) -> tuple[nn.Module, nn.Module]:
    """A convolution that keeps the size, and the batch norm that follows it."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs)


def non_local_block(channels: int, config: NonLocalConfig) -> NonLocalBlock:
    """The block that the configuration describes, half as wide inside.

    Raises:
        ValueError: half of the channels does not divide into the groups.
    """
    if channels % 2 or channels // 2 % config.groups:
        raise ValueError(f"head.non_local.groups: {config.groups} groups do not divide half of {channels} channels")
    return NonLocalBlock(
        channels,
        pairwise=config.pairwise,
        groups=config.groups,
        scale=config.scale,
        relu_after=config.relu_after,
    )


def _linear(inputs: int, outputs: int, std: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer
