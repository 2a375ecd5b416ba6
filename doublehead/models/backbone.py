"""ResNet with a feature pyramid, or cut before its last stage (C4): torchvision's modules under our configuration."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import Bottleneck
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from ..config import BackboneConfig

NORMS = {"frozen_batch_norm": FrozenBatchNorm2d, "batch_norm": nn.BatchNorm2d, "group_norm": partial(nn.GroupNorm, 32)}
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")
_CHECKPOINT_PREFIX = "detector.backbone."


class Backbone(NamedTuple):
    """What the rest of the detector needs to know of its backbone."""

    body: nn.Module
    """Images -> list of maps; RoIs are pooled from the first `len(strides)`, the RPN sees all."""
    channels: int
    """Of every map."""
    strides: tuple[int, ...]
    """Pixels per cell of the maps RoIs are pooled from."""
    map_strides: tuple[int, ...]
    """Of all maps."""
    conv5: nn.Module | None = None
    """C4: the ResNet's last stage, which becomes the head."""


class ResNetFPN(BackboneWithFPN):
    """Images -> [P2, P3, P4, P5, P6]; P6 is P5 subsampled, for the RPN alone (Lin et al. 2017)."""

    strides = (4, 8, 16, 32)

    def __init__(self, config: BackboneConfig) -> None:
        resnet, norm = _resnet(config)
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
        if _is_checkpoint(config.weights):
            _load_checkpoint(self, Path(config.weights))

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """`Tensor[B, 3, H, W]` -> five `Tensor[B, fpn_channels, H / stride, W / stride]`, strides 4 .. 64."""
        return list(super().forward(pixels).values())


class ResNetC4(nn.Module):
    """Images -> [C4]: one map of stride 16; the ResNet's last stage is the head (Ren et al. 2015, He et al. 2016)."""

    strides = (16,)

    def __init__(self, resnet: nn.Module) -> None:
        super().__init__()
        self.body = IntermediateLayerGetter(resnet, {"layer3": "0"})

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """`Tensor[B, 3, H, W]` -> one `Tensor[B, C, H / 16, W / 16]`."""
        return [self.body(pixels)["0"]]


MSRA_SOURCE = "https://dl.fbaipublicfiles.com/detectron/ImageNetPretrained/MSRA/{}"
"""Where `R-50.pkl` and `R-101.pkl` are, from which Detectron, maskrcnn-benchmark and the authors' release start."""


def _check_msra_file(weights: str | None) -> None:
    """Say where MSRA's ResNets are, where one is wanted and missing; they are never fetched."""
    path = Path(weights or "")
    if path.name in ("R-50.pkl", "R-101.pkl") and not path.exists():
        source = MSRA_SOURCE.format(path.name)
        raise FileNotFoundError(
            f"backbone.weights: no file {path}; get it from {source} and give its path: --model.backbone.weights PATH"
        )


def build_backbone(config: BackboneConfig) -> Backbone:
    """The backbone that the configuration describes, with its weights loaded and its first stages frozen.

    Raises:
        ValueError, FileNotFoundError: `frozen_stages` is out of range, or `weights` are missing or do not fit.
    """
    _check_msra_file(config.weights)
    if config.neck == "fpn":
        body = ResNetFPN(config)
        return Backbone(body, config.fpn_channels, body.strides, (*body.strides, 2 * body.strides[-1]))
    if config.neck != "none":
        raise ValueError(f"backbone.neck: expected 'fpn' or 'none', got {config.neck!r}")
    if _is_checkpoint(config.weights):
        raise ValueError("backbone.weights: a detector's checkpoint can only start a backbone with neck 'fpn'")
    resnet, _ = _resnet(config)
    return Backbone(ResNetC4(resnet), resnet.inplanes // 2, ResNetC4.strides, ResNetC4.strides, resnet.layer4)


def _resnet(config: BackboneConfig) -> tuple[nn.Module, partial]:
    norm = partial(NORMS[config.norm], eps=config.norm_eps)
    weights = "IMAGENET1K_V1" if config.weights == "imagenet" else None
    resnet = getattr(torchvision.models, config.name)(weights=weights, norm_layer=norm)
    if config.weights not in (None, "imagenet") and not _is_checkpoint(config.weights):
        _load_resnet(resnet, Path(config.weights))
    if config.stride_in_1x1:
        _stride_in_1x1(resnet)
    _freeze(resnet, config.frozen_stages)
    return resnet, norm


def _stride_in_1x1(resnet: nn.Module) -> None:
    """Let bottlenecks halve their map in the first convolution, as the first ResNets did (He et al. 2016)."""
    for block in resnet.modules():
        if isinstance(block, Bottleneck):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride


def _freeze(resnet: nn.Module, stages: int) -> None:
    if not 0 <= stages <= len(STAGES):
        raise ValueError(f"backbone.frozen_stages: expected 0 .. {len(STAGES)}, got {stages}")
    trained = STAGES[stages:]
    for name, parameter in resnet.named_parameters():
        stage = name.split(".")[0]
        parameter.requires_grad_((stage if stage.startswith("layer") else "stem") in trained)


def _load_resnet(resnet: nn.Module, path: Path) -> None:
    """Load a classification ResNet's state_dict (torchvision's names); its `fc` layer is not needed."""
    _require_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    _load(resnet, state, path, not_needed="fc.")


def _load_checkpoint(backbone: nn.Module, path: Path) -> None:
    """Load the backbone and the pyramid of a detector's model.safetensors."""
    import safetensors  # only here: models themselves need PyTorch and torchvision alone

    _require_file(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(_CHECKPOINT_PREFIX)]  # noqa: SIM118 (not a dict)
            state = {name.removeprefix(_CHECKPOINT_PREFIX): file.get_tensor(name) for name in names}
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"backbone.weights: {path} is not a safetensors file, or truncated ({error})") from error
    _load(backbone, state, path)


def _load(module: nn.Module, state: dict[str, Tensor], path: Path, not_needed: str | None = None) -> None:
    try:
        missing, unexpected = module.load_state_dict(state, strict=False)
    except RuntimeError as error:  # a tensor of another shape
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"backbone.weights: {path} does not fit: {reason}") from error
    missing = [name for name in missing if not_needed is None or not name.startswith(not_needed)]
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    unexpected = [name for name in unexpected if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(f"backbone.weights: {path} does not fit: missing {missing[:5]}, unexpected {unexpected[:5]}")


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"backbone.weights: no file {path}; give a ResNet state_dict, a detector's model.safetensors, "
            f"'imagenet', or None"
        )


def _is_checkpoint(weights: str | None) -> bool:
    return weights is not None and weights.endswith(".safetensors")
