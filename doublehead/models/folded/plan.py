"""Reads modules into a plan: nested tuples that say what is computed, equal where the computation is, without tensors.

Only classes that are known, themselves and not subclasses, are read; of everything else the reader raises `Unknown`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from .guards import is_bare
from .layers import Layer

CONTAINERS = (nn.Sequential, Conv2dNormActivation)
NORMS = (nn.BatchNorm2d, FrozenBatchNorm2d)
BLOCKS = (BasicBlock, Bottleneck)
_FORWARDS = {
    kind: kind.forward
    for kind in (
        *CONTAINERS, *NORMS, *BLOCKS, nn.Conv2d, nn.ReLU, nn.MaxPool2d, IntermediateLayerGetter, FeaturePyramidNetwork,
        LastLevelMaxPool,
    )
}  # fmt: skip
"""What each class does; another function in its place, put there for all its modules, does something else."""


class Unknown(Exception):
    """A module whose computation is not known, or that somebody watches."""


class Pool(NamedTuple):
    """Max pooling: the arguments of `max_pool2d`."""

    kernel: int | tuple[int, int]
    stride: int | tuple[int, int]
    padding: int | tuple[int, int]
    dilation: int | tuple[int, int]
    ceil: bool


class Residual(NamedTuple):
    """Layers, the last of which is added to the shortcut, and ReLU."""

    layers: tuple[Layer, ...]
    shortcut: Layer | None
    """None: the input itself."""


Steps = tuple[Layer | Pool | Residual, ...]


class Stage(NamedTuple):
    """A part of a body, and under which name its map is given out; None: not at all."""

    steps: Steps
    name: str | None


class Pyramid(NamedTuple):
    """Lateral and output convolutions of each level, finest first."""

    lateral: tuple[Layer, ...]
    output: tuple[Layer, ...]
    pooled: bool
    """Whether the coarsest map, subsampled, is another level."""


class ProposalHead(NamedTuple):
    """Convolutions on each level, and the two that predict from their result."""

    hidden: Steps
    outputs: tuple[Layer, ...]
    """One that does the work of both, which reads their input once, or the two."""
    channels: tuple[int, int]
    """Of the logits and of the deltas."""


class SideBySide(NamedTuple):
    """Convolutions of the same input that run as one: their output channels one after the other."""

    convs: tuple[nn.Conv2d, ...]

    @property
    def weight(self) -> Tensor:
        return torch.cat([conv.weight for conv in self.convs])

    @property
    def bias(self) -> Tensor | None:
        return None if self.convs[0].bias is None else torch.cat([conv.bias for conv in self.convs])


class Reader:
    """Reads modules, and collects the convolutions in the order of their layers' indices."""

    def __init__(self) -> None:
        self.sources: list[tuple[Layer, nn.Conv2d | SideBySide, nn.Module | None]] = []
        self.tensors: list[Tensor] = []
        self.counters: list[Tensor] = []
        """Of batches: they tell that a norm in training changed its statistics, which have no new version then."""
        self.sums: list[tuple[int, int]] = []
        """Indices of layers that are added, the shortcut last."""

    def body(self, module: nn.Module) -> tuple[Stage, ...]:
        _require(module, IntermediateLayerGetter)
        stages, pending = [], []
        for name, child in module._modules.items():
            pending.append(child)
            if name in module.return_layers:
                stages.append(Stage(self.steps(pending), module.return_layers[name]))
                pending = []
        return (*stages, Stage(self.steps(pending), None)) if pending else tuple(stages)

    def pyramid(self, module: nn.Module) -> Pyramid:
        _require(module, FeaturePyramidNetwork)
        if module.extra_blocks is not None:
            _require(module.extra_blocks, LastLevelMaxPool)
        if not is_bare(module.inner_blocks) or not is_bare(module.layer_blocks):
            raise Unknown
        lateral = tuple(self._linear(child) for child in module.inner_blocks)
        output = tuple(self._linear(child) for child in module.layer_blocks)
        return Pyramid(lateral, output, module.extra_blocks is not None)

    def proposal_head(self, hidden: Iterable[nn.Module], logits: nn.Module, deltas: nn.Module) -> ProposalHead:
        """`hidden`: modules, one after the other."""
        steps, first = self.steps(hidden), len(self.sources)
        outputs = self._linear(logits), self._linear(deltas)
        channels = outputs[0].outputs, outputs[1].outputs
        return ProposalHead(steps, self._side_by_side(first) or outputs, channels)

    def _side_by_side(self, first: int) -> tuple[Layer] | None:
        """Make one layer of those from the index `first` on; None: they differ in more than their output channels."""
        layers, convs, norms = zip(*self.sources[first:], strict=True)
        alike = {
            (layer._replace(index=0, outputs=0), conv.bias is None) for layer, conv in zip(layers, convs, strict=True)
        }
        if len(alike) > 1 or layers[0].groups > 1 or any(norms):
            return None
        layer = layers[0]._replace(outputs=sum(layer.outputs for layer in layers))
        self.sources[first:] = [(layer, SideBySide(convs), None)]
        return (layer,)

    def steps(self, modules: Iterable[nn.Module]) -> Steps:
        """Modules that run one after the other."""
        steps: list[Layer | Pool | Residual] = []
        queue = [child for module in modules for child in _flat(module)]
        while queue:
            module = queue.pop(0)
            if type(module) is nn.Conv2d:
                norm = queue.pop(0) if queue and kind_of(queue[0]) in NORMS else None
                relu = queue.pop(0) if queue and type(queue[0]) is nn.ReLU else None
                steps.append(self._layer(module, norm, relu))
            elif type(module) is nn.MaxPool2d:
                steps.append(_pool(module))
            else:
                steps.append(self._residual(module))
        return tuple(steps)

    def _residual(self, block: nn.Module) -> Residual:
        _require(block, *BLOCKS)
        _require(block.relu, nn.ReLU)
        parts = [(block.conv1, block.bn1, block.relu), (block.conv2, block.bn2, block.relu)]
        if type(block) is Bottleneck:
            parts.append((block.conv3, block.bn3, block.relu))
        layers = tuple(self._layer(*part) for part in parts)
        shortcut = None if block.downsample is None else self._linear(block.downsample)
        if shortcut is not None:
            self.sums.append((layers[-1].index, shortcut.index))
        return Residual(layers, shortcut)

    def _linear(self, module: nn.Module) -> Layer:
        """A convolution, perhaps with a norm, without ReLU."""
        steps = self.steps([module])
        if len(steps) != 1 or type(steps[0]) is not Layer or steps[0].relu:
            raise Unknown
        return steps[0]

    def _layer(self, conv: nn.Module, norm: nn.Module | None, relu: nn.Module | None) -> Layer:
        _require(conv, nn.Conv2d)
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise Unknown
        tensors = [conv.weight, conv.bias]
        if norm is not None:
            _require(norm, *NORMS)
            if norm.running_mean is None or norm.running_var is None:  # of the batch itself
                raise Unknown
            tensors += [norm.weight, norm.bias, norm.running_mean, norm.running_var]
            if getattr(norm, "num_batches_tracked", None) is not None:
                self.counters.append(norm.num_batches_tracked)
        if relu is not None:
            _require(relu, nn.ReLU)
        layer = Layer(
            len(self.sources), conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,
            conv.dilation, conv.groups, None if norm is None else norm.eps, relu is not None,
        )  # fmt: skip
        present = [tensor for tensor in tensors if tensor is not None]
        if not all(isinstance(tensor, Tensor) for tensor in present) or conv.weight.shape != _shape(layer):
            raise Unknown
        self.sources.append((layer, conv, norm))
        self.tensors += present
        return layer


def forwards_as_defined() -> bool:
    """Whether nobody has put another function in a class's place, for all its modules."""
    return all(kind.forward is forward for kind, forward in _FORWARDS.items())


def kind_of(module: nn.Module) -> type:
    """The module's class; of a class that says that it computes the same as another, `folds_as`, the other."""
    return vars(type(module)).get("folds_as", type(module))


def _require(module: nn.Module | None, *kinds: type) -> None:
    kind = None if module is None else kind_of(module)
    if kind not in kinds or not is_bare(module):
        raise Unknown
    if kind is type(module) and kind.forward is not _FORWARDS[kind]:
        raise Unknown


def _flat(module: nn.Module | None) -> Iterator[nn.Module]:
    """The modules that a module runs one after the other; itself if it is no container."""
    if type(module) not in CONTAINERS:
        yield module
        return
    _require(module, *CONTAINERS)
    for child in module._modules.values():
        yield from _flat(child)


def _pool(module: nn.MaxPool2d) -> Pool:
    _require(module, nn.MaxPool2d)
    if module.return_indices:
        raise Unknown
    return Pool(module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)


def _shape(layer: Layer) -> tuple[int, ...]:
    return (layer.outputs, layer.inputs // layer.groups, *layer.kernel)
