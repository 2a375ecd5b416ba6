"""Reads a ResNet of torchvision, timm, MMPretrain, Detectron2 or Caffe2 (MSRA), with torchvision's names.

Files with Caffe2's names (Detectron's R-50.pkl) hold He et al.'s own weights: for BGR images, with the stride in the
1x1 convolutions, and batch norms as a scale and a bias, without epsilon.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .entries import some, take_state
from .pickles import WeightsError

_BRANCHES = {"branch1": ("downsample.0", "downsample.1")} | {
    f"branch2{letter}": (f"conv{layer}", f"bn{layer}") for layer, letter in enumerate("abc", 1)
}
"""Caffe2's name of a convolution -> torchvision's names of the convolution and its norm."""
_BLOCK = re.compile(r"res([2-5])_(\d+)_(branch1|branch2[abc])_(w|bn_s|bn_b)")
_STEM = {"conv1_w": "conv1.weight", "res_conv1_bn_s": "bn1.weight", "res_conv1_bn_b": "bn1.bias",
         "conv1_bn_s": "bn1.weight", "conv1_bn_b": "bn1.bias"}  # fmt: skip
_PARTS = {"bn_s": "weight", "bn_b": "bias"}
_CAFFE2_UNNEEDED = re.compile(r"(pred|fc1000|last_out)_[wb]|conv1_b|.*_momentum|lr|model_iter")
"""The classifier, optimizer state, and the bias of the first convolution, which Detectron and its successors ignore
too: the following norm has one."""
_DETECTRON2_BLOCK = re.compile(r"res([2-5])\.(\d+)\.(shortcut|conv[123])(\.norm)?\.(\w+)")
_DETECTRON2_STEM = re.compile(r"stem\.conv1(\.norm)?\.(\w+)")
_CLASSIFIER = ("fc.", "head.", "classifier.", "stem.fc.", "linear.")
_SIGN = "layer1.0.conv1.weight"


class ResNetState(NamedTuple):
    """A ResNet's weights."""

    tensors: dict[str, Tensor]
    """The weights under torchvision's names, without a classifier."""
    caffe2: bool
    """Whether the file has Caffe2's names: its network takes BGR, with the stride in the 1x1 convolutions."""


def resnet_state(path: str | Path, content: Any, norm_eps: float) -> ResNetState:
    """The ResNet in `content`, the result of `read_file`.

    Args:
        norm_eps: the epsilon of the norms that get the weights.  Caffe2's norms have none, so their variance is set to
            cancel it.

    Raises:
        WeightsError: there is no ResNet, or more than one and its classifier, or tensors are not finite.
    """
    if is_caffe2(content):
        tensors = _from_caffe2(path, _caffe2_blobs(content), norm_eps)
        caffe2 = True
    else:
        tensors, caffe2 = take_state(path, content).tensors, False
    tensors = tensors if caffe2 else _torchvision_names(path, tensors)
    floats = {name: tensor.float() for name, tensor in tensors.items() if tensor.is_floating_point()}
    broken = [name for name, tensor in floats.items() if not tensor.isfinite().all()]
    if broken:
        raise WeightsError(f"{path}: NaN or infinity in {some(broken)}")
    return ResNetState(tensors, caffe2)


def is_caffe2(content: Any) -> bool:
    """Whether the result of `read_file` has Caffe2's names: directly, or in {"blobs": ...} as in Detectron."""
    if not isinstance(content, Mapping):
        return False
    return isinstance(content.get("blobs"), Mapping) or "conv1_w" in _caffe2_blobs(content)


def _caffe2_blobs(content: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in ("blobs", "model"):
        if isinstance(content.get(key), Mapping):
            return content[key]
    return content


def _from_caffe2(path: str | Path, blobs: Mapping[str, Any], norm_eps: float) -> dict[str, Tensor]:
    needed = {name: blob for name, blob in blobs.items() if not _CAFFE2_UNNEEDED.fullmatch(str(name))}
    names = {name: caffe2_name(str(name)) for name in needed}
    if unknown := [str(name) for name in names if names[name] is None]:
        raise WeightsError(f"{path}: blobs that no ResNet has: {some(unknown)}; accepted: a ResNet's of Caffe2 alone")
    if len(set(names.values())) < len(names):
        raise WeightsError(f"{path}: has the first norm twice, as res_conv1_bn and conv1_bn")
    tensors = {names[name]: tensor for name, tensor in take_state(path, needed).tensors.items()}
    for scale in [name for blob, name in names.items() if str(blob).endswith("_bn_s")]:
        layer = scale.removesuffix("weight")
        tensors[f"{layer}running_mean"] = torch.zeros_like(tensors[scale])
        tensors[f"{layer}running_var"] = torch.full_like(tensors[scale], 1 - norm_eps)
    return tensors


def caffe2_name(name: str) -> str | None:
    """torchvision's name of a blob, such as "layer1.0.bn1.weight" of "res2_0_branch2a_bn_s"; None: no ResNet has it."""
    if name in _STEM:
        return _STEM[name]
    found = _BLOCK.fullmatch(name)
    if found is None:
        return None
    stage, block, branch, part = found.groups()
    convolution, norm = _BRANCHES[branch]
    layer = convolution if part == "w" else norm
    return f"layer{int(stage) - 1}.{block}.{layer}.{_PARTS.get(part, 'weight')}"


def _torchvision_names(path: str | Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without a prefix of the ResNet's names ("backbone.") and without a classifier.

    Raises:
        WeightsError: they are not a ResNet, or more than one.
    """
    if "stem.conv1.weight" in tensors:
        tensors = {_from_detectron2(name): tensor for name, tensor in tensors.items()}
    prefixes = {name.removesuffix(_SIGN) for name in tensors if f".{name}".endswith(f".{_SIGN}")}
    if not prefixes and "conv1.weight" in tensors:
        prefixes = {""}  # incomplete or smaller; loading reports what is missing
    if len(prefixes) != 1:
        what = "several ResNets" if prefixes else "no ResNet with torchvision's, Detectron2's or Caffe2's names"
        raise WeightsError(f"{path}: {what} in it (its tensors begin with {some(tensors)})")
    prefix = prefixes.pop()
    mine = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    others = [name for name in tensors if not name.startswith((prefix, *_CLASSIFIER))]
    if others:
        raise WeightsError(
            f"{path}: more than a ResNet: {some(others)}. A detector of another project: "
            "doublehead convert makes a model.safetensors of it, which is accepted"
        )
    return {name: tensor for name, tensor in mine.items() if not name.startswith(_CLASSIFIER)}


def _from_detectron2(name: str) -> str:
    """torchvision's name for a tensor of Detectron2."""
    if found := _DETECTRON2_STEM.fullmatch(name):
        return f"{'bn1' if found[1] else 'conv1'}.{found[2]}"
    if found := _DETECTRON2_BLOCK.fullmatch(name):
        stage, block, layer, norm, part = found.groups()
        if layer == "shortcut":
            layer = "downsample.1" if norm else "downsample.0"
        elif norm:
            layer = layer.replace("conv", "bn")
        return f"layer{int(stage) - 1}.{block}.{layer}.{part}"
    return name
