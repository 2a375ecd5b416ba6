"""Accelerates torchvision's Faster, Mask and Keypoint R-CNN in place, and restores them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from ...models.folded import forget
from ...ops import MultiScaleRoIAlign as OurMultiScaleRoIAlign
from .folded import FOLDED
from .modules import (
    AcceleratedFrozenBatchNorm2d,
    AcceleratedMultiScaleRoIAlign,
    AcceleratedRoIHeads,
    AcceleratedRPN,
    AcceleratedTransform,
    ChannelsLastMultiScaleRoIAlign,
)

ACCELERATED = {
    RegionProposalNetwork: AcceleratedRPN,
    RoIHeads: AcceleratedRoIHeads,
    MultiScaleRoIAlign: AcceleratedMultiScaleRoIAlign,
    GeneralizedRCNNTransform: AcceleratedTransform,
    FrozenBatchNorm2d: AcceleratedFrozenBatchNorm2d,
}
ORIGINAL = {ours: theirs for theirs, ours in (ACCELERATED | FOLDED).items()} | {
    ChannelsLastMultiScaleRoIAlign: MultiScaleRoIAlign
}

POOLS = ("box_roi_pool", "mask_roi_pool", "keypoint_roi_pool")
BOX_CLIP = math.log(1000 / 16)
"""The limit of dw and dh in `doublehead.ops.detections`: torchvision's default."""

WRAPPERS = {
    "DataParallel": "give model.module",
    "DistributedDataParallel": "give model.module",
    "FullyShardedDataParallel": "accelerate the model before it is sharded",
    "OptimizedModule": "accelerate the model before torch.compile",
}


def accelerate(model: nn.Module, fold: bool = True) -> nn.Module:
    """Replace slow parts of a torchvision detector with this library's operators, in place: `doublehead.accelerate`."""
    swaps = _swaps(model, fold)  # everything is checked before anything is changed
    for module, ours in swaps:
        module.__class__ = ours
    if not fold:
        _put_back(model, FOLDED)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate`: this is `doublehead.restore`."""
    _check_model(model)
    _put_back(model, ORIGINAL.values())
    return model


def _swaps(model: nn.Module, fold: bool) -> list[tuple[nn.Module, type]]:
    """The modules to change and their new classes; modules that are changed already are checked and left out.

    Raises:
        TypeError, ValueError: see `doublehead.accelerate`.
    """
    _check_model(model)
    needed = [("rpn", RegionProposalNetwork), ("roi_heads", RoIHeads)]
    needed += [(f"roi_heads.{name}", MultiScaleRoIAlign) for name in POOLS]
    for name, theirs in needed:
        module = _attribute(model, name)
        if module is None and name.endswith(POOLS[1:]) or isinstance(module, OurMultiScaleRoIAlign):
            continue  # no such head, or a pooler the user built from our class
        _check_module(name, module, theirs)
    for name in ("rpn.box_coder", "roi_heads.box_coder"):
        _check_coder(name, _attribute(model, name))
    for name in POOLS:
        _check_levels(f"roi_heads.{name}", getattr(model.roi_heads, name))

    swaps: dict[nn.Module, type] = {}
    heads = model.roi_heads
    own = [model.rpn, heads, *(getattr(heads, name) for name in POOLS)]
    if _known_layers(model.backbone, model.rpn.head):  # other layers may not support channels-last memory
        own += [model.transform, *model.backbone.modules()]
        swaps |= _folding(model.backbone, model.rpn.head) if fold else {}
    swaps |= _folding(heads.box_head, heads.box_predictor) if fold else {}
    swaps |= {module: ACCELERATED[type(module)] for module in own if type(module) in ACCELERATED}
    if heads.box_roi_pool in swaps and _known_layers(heads.box_head, heads.box_predictor):
        shared = heads.box_roi_pool in (heads.mask_roi_pool, heads.keypoint_roi_pool)
        swaps[heads.box_roi_pool] = AcceleratedMultiScaleRoIAlign if shared else ChannelsLastMultiScaleRoIAlign
    return list(swaps.items())


def _folding(*modules: nn.Module) -> dict[nn.Module, type]:
    return {module: FOLDED[type(module)] for module in modules if type(module) in FOLDED}


def _put_back(model: nn.Module, theirs: Iterable[type]) -> None:
    """Give the modules of our classes that stand for these their own class again."""
    theirs = set(theirs)
    for module in model.modules():
        if ORIGINAL.get(type(module)) in theirs:
            module.__class__ = ORIGINAL[type(module)]
            for part in module.modules():
                forget(part)


def _attribute(model: nn.Module, path: str) -> object:
    for name in path.split("."):
        model = getattr(model, name, None)
    return model


def _check_model(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model: a TorchScript module cannot be changed; accelerate the model it was made from")
    if not isinstance(model, GeneralizedRCNN):
        name = type(model).__name__
        hint = WRAPPERS.get(name, "its Faster, Mask and Keypoint R-CNN are accepted; one-stage detectors such as "
                                  "RetinaNet, FCOS and SSD have no RoIs")  # fmt: skip
        raise TypeError(f"model must be a two-stage detector of torchvision, got {name}: {hint}")


def _check_module(name: str, module: object, theirs: type) -> None:
    if ORIGINAL.get(type(module), type(module)) is not theirs:
        got = f"{type(module).__module__}.{type(module).__qualname__}"
        raise TypeError(
            f"model.{name} must be torchvision's {theirs.__name__} itself, got {got}, whose "
            "behaviour is unknown; the model is left as it is"
        )
    methods = {method for method, value in vars(theirs).items() if callable(value)} | {"forward"}
    if replaced := sorted(methods & set(vars(module))):
        raise ValueError(
            f"model.{name}.{replaced[0]} was replaced on this module: acceleration would not call it; "
            "remove it first; the model is left as it is"
        )


def _check_coder(name: str, coder: object) -> None:
    if type(coder) is not BoxCoder or {"decode", "decode_single"} & set(vars(coder)):
        raise TypeError(
            f"model.{name} must be torchvision's BoxCoder itself, got {type(coder).__module__}."
            f"{type(coder).__qualname__}; the model is left as it is"
        )
    if len(coder.weights) != 4 or not all(coder.weights):
        raise ValueError(f"model.{name}.weights must be 4 numbers other than 0, got {coder.weights}")
    if name.startswith("roi_heads") and coder.bbox_xform_clip != BOX_CLIP:
        raise ValueError(
            f"model.{name}.bbox_xform_clip must be log(1000 / 16), got {coder.bbox_xform_clip}; "
            "the model is left as it is"
        )


def _check_levels(name: str, pool: nn.Module | None) -> None:
    mapper = getattr(pool, "map_levels", None)
    if mapper is not None and (type(mapper) is not LevelMapper or mapper.eps != 1e-6):
        raise ValueError(
            f"model.{name}.map_levels must be torchvision's LevelMapper with eps 1e-6, got {type(mapper).__name__} "
            f"with {getattr(mapper, 'eps', 'none')}; the model is left as it is"
        )


def _known_layers(*modules: nn.Module) -> bool:
    """Whether all layers are PyTorch's and torchvision's own."""
    layers = (layer for module in modules for layer in module.modules())
    return all(type(layer).__module__.partition(".")[0] in ("torch", "torchvision", "doublehead") for layer in layers)
