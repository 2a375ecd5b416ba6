"""ResNet with a feature pyramid, or cut before its last stage (C4): torchvision's modules under our configuration."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
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
from ..weights import WeightsError, read_file, resnet_state
from ..weights.entries import some
from ..weights.files import first_line, is_own_model, is_safetensors
from ..weights.wrappers import without_wrappers
from . import folded

NORMS = {"frozen_batch_norm": FrozenBatchNorm2d, "batch_norm": nn.BatchNorm2d, "group_norm": partial(nn.GroupNorm, 32)}
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")
_CHECKPOINT_PREFIX = "detector.backbone."


class Backbone(NamedTuple):
    """What the rest of the detector needs to know of its backbone."""

    body: nn.Module
    """Images -> list of maps; RoIs are pooled from the first `len(strides)`, the RPN sees all."""
    channels: int
    """Channels of every map."""
    strides: tuple[int, ...]
    """Pixels per cell of the maps RoIs are pooled from."""
    map_strides: tuple[int, ...]
    """Pixels per cell of all maps."""
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
        maps = folded.backbone(self, self.body, self.fpn, pixels)
        return list((super().forward(pixels) if maps is None else maps).values())

    def train(self, mode: bool = True) -> ResNetFPN:
        folded.forget(self)
        return super().train(mode)


class ResNetC4(nn.Module):
    """Images -> [C4]: one map of stride 16; the ResNet's last stage is the head (Ren et al. 2015, He et al. 2016)."""

    strides = (16,)

    def __init__(self, resnet: nn.Module) -> None:
        super().__init__()
        self.body = IntermediateLayerGetter(resnet, {"layer3": "0"})

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """`Tensor[B, 3, H, W]` -> one `Tensor[B, C, H / 16, W / 16]`."""
        maps = folded.backbone(self, self.body, None, pixels)
        return [(self.body(pixels) if maps is None else maps)["0"]]

    def train(self, mode: bool = True) -> ResNetC4:
        folded.forget(self)
        return super().train(mode)


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
    resnet = getattr(torchvision.models, config.name)(weights=None, norm_layer=norm)
    if config.weights == "imagenet":
        _load_imagenet(resnet, config.name)
    elif config.weights is not None and not _is_checkpoint(config.weights):  # a checkpoint: with the pyramid, later
        _load_resnet(resnet, config)
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


def _load_imagenet(resnet: nn.Module, name: str) -> None:
    """Load torchvision's weights, from its cache or over the network.

    Raises:
        ValueError: they are not there and cannot be fetched, or the file in the cache is damaged.
    """
    source = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
    file = Path(torch.hub.get_dir(), "checkpoints", source.url.rpartition("/")[2])
    elsewhere = "or give --model.backbone.weights PATH of a ResNet's weights, or None to start from scratch"
    known = file.is_file()
    try:
        state = source.get_state_dict(progress=True, check_hash=True, map_location="cpu", weights_only=True)
    except Exception as error:  # no network, a proxy's page, a full disk, a damaged file
        if known:
            reason = error.strerror if isinstance(error, OSError) else "PyTorch cannot read it"
            raise ValueError(
                f"backbone.weights: the ImageNet weights in {file} are damaged ({reason}): remove it, to fetch them "
                f"again, {elsewhere}"
            ) from error
        reason = first_line(getattr(error, "reason", None) or error)
        raise ValueError(
            f"backbone.weights: the ImageNet weights {file.name} cannot be fetched ({reason}): put {source.url} at "
            f"{file}, {elsewhere}"
        ) from error
    _load(resnet, state, file, not_needed="fc.")


def _load_resnet(resnet: nn.Module, config: BackboneConfig) -> None:
    """Load a ResNet's weights under one of the known sets of names; its classifier is not needed."""
    path = Path(config.weights)
    try:
        state = resnet_state(path, read_file(path), config.norm_eps)
    except WeightsError as error:
        raise ValueError(f"backbone.weights: {error}") from error
    if state.caffe2 and not config.stride_in_1x1 and config.name != "resnet18":
        warnings.warn(
            f"backbone.weights: {path} has Caffe2's names, and so was trained with the stride in the 1x1 convolutions: "
            "set --model.backbone.stride-in-1x1 True",
            stacklevel=2,
        )
    _load(resnet, state.tensors, path, not_needed="fc.")


def _load_checkpoint(backbone: nn.Module, path: Path) -> None:
    """Load the backbone and the pyramid of a detector's model.safetensors.

    Raises:
        ValueError: it is damaged, or its weights are not finite or do not fit.
    """
    import safetensors  # only here: models themselves need PyTorch and torchvision alone

    from ..weights import digest

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"backbone.weights: {path} is not a safetensors file, or truncated ({error})") from error
    if not digest.matches(metadata, tensors):
        raise ValueError(f"backbone.weights: {path} was changed or damaged since it was written: get it again")
    tensors = {without_wrappers(name): tensor for name, tensor in tensors.items()}
    state = {
        name.removeprefix(_CHECKPOINT_PREFIX): tensor
        for name, tensor in tensors.items()
        if name.startswith(_CHECKPOINT_PREFIX)
    }
    broken = [name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"backbone.weights: {path}: NaN or infinity in {_some(broken)}")
    _load(backbone, state, path)


def _load(module: nn.Module, state: Mapping[str, Tensor], path: Path, not_needed: str | None = None) -> None:
    """Load exactly what `module` has; what begins with `not_needed` may be missing, too much, or of any shape.

    Raises:
        ValueError: something else is; the message names it.
    """
    wanted = {name: tensor for name, tensor in module.state_dict().items() if _needed(name, not_needed)}
    given = {name: tensor for name, tensor in state.items() if _needed(name, not_needed)}
    missing, unexpected = wanted.keys() - given.keys(), given.keys() - wanted.keys()
    if missing or unexpected:
        raise ValueError(
            f"backbone.weights: {path} does not fit: missing {_some(missing)}, unexpected {_some(unexpected)}"
        )
    for name, tensor in given.items():
        if tensor.shape != wanted[name].shape or tensor.is_floating_point() != wanted[name].is_floating_point():
            raise ValueError(
                f"backbone.weights: {path} does not fit: size mismatch for {name}: {tuple(tensor.shape)} "
                f"({tensor.dtype}) in the file, {tuple(wanted[name].shape)} ({wanted[name].dtype}) in the model"
            )
    module.load_state_dict(given, strict=False)


def _needed(name: str, not_needed: str | None) -> bool:
    return not name.endswith("num_batches_tracked") and not (not_needed and name.startswith(not_needed))


def _some(names: Iterable[str]) -> str:
    return some(sorted(names)) or "nothing"


def _require_file(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(
            f"backbone.weights: no file {path}; give a ResNet's weights, a detector's model.safetensors, "
            f"'imagenet', or None"
        )


def _is_checkpoint(weights: str | None) -> bool:
    """Whether these are a detector of this library, by the header of the file.

    Raises:
        FileNotFoundError, ValueError: the file is not there, or damaged.
    """
    if weights in (None, "imagenet"):
        return False
    _require_file(Path(weights))
    try:
        return is_safetensors(weights) and is_own_model(weights)
    except WeightsError as error:
        raise ValueError(f"backbone.weights: {error}") from error
