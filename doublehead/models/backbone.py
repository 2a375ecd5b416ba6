"""ResNet with a feature pyramid: torchvision's modules under this library's configuration."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from ..config import BackboneConfig

NORMS = {"frozen_batch_norm": FrozenBatchNorm2d, "batch_norm": nn.BatchNorm2d, "group_norm": partial(nn.GroupNorm, 32)}
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")
STRIDES = (4, 8, 16, 32)
"""Pixels per cell of P2 .. P5, the levels RoIs are pooled from."""


class ResNetFPN(BackboneWithFPN):
    """Images -> [P2, P3, P4, P5, P6]; P6 is P5 subsampled, for the RPN alone (Lin et al. 2017)."""

    def __init__(self, config: BackboneConfig) -> None:
        norm = partial(NORMS[config.norm], eps=config.norm_eps)
        weights = "IMAGENET1K_V1" if config.weights == "imagenet" else None
        resnet = getattr(torchvision.models, config.name)(weights=weights, norm_layer=norm)
        if config.weights not in (None, "imagenet"):
            _load_resnet(resnet, Path(config.weights))
        _freeze(resnet, config.frozen_stages)
        widths = [resnet.inplanes // 8 * 2**stage for stage in range(4)]
        layers = {f"layer{stage + 1}": str(stage) for stage in range(4)}
        super().__init__(
            resnet,
            layers,
            widths,
            config.fpn_channels,
            extra_blocks=LastLevelMaxPool(),
            norm_layer=norm if config.fpn_norm else None,
        )

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """`Tensor[B, 3, H, W]` -> five `Tensor[B, fpn_channels, H / stride, W / stride]`, strides 4 .. 64."""
        return list(super().forward(pixels).values())


def _freeze(resnet: nn.Module, stages: int) -> None:
    if not 0 <= stages <= len(STAGES):
        raise ValueError(f"backbone.frozen_stages: expected 0 .. {len(STAGES)}, got {stages}")
    trained = STAGES[stages:]
    for name, parameter in resnet.named_parameters():
        stage = name.split(".")[0]
        parameter.requires_grad_((stage if stage.startswith("layer") else "stem") in trained)


def _load_resnet(resnet: nn.Module, path: Path) -> None:
    """Load a classification ResNet's state_dict (torchvision's names); its `fc` layer is not needed."""
    if not path.is_file():
        raise FileNotFoundError(f"backbone.weights: no file {path}; give a ResNet state_dict, 'imagenet', or None")
    state = torch.load(path, map_location="cpu", weights_only=True)
    missing, unexpected = resnet.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.startswith("fc.")]
    unexpected = [name for name in unexpected if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(f"backbone.weights: {path} does not fit: missing {missing[:5]}, unexpected {unexpected[:5]}")
