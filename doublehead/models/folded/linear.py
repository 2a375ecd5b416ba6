"""Fully connected layers in float32 by oneDNN's products (`ops.onednn.linear`), on many rows at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...ops import onednn
from ..folding import layer_dtype
from .guards import is_bare, may_stand_in
from .networks import forget, remembered

_FORWARDS = {kind: kind.forward for kind in (nn.Flatten, nn.Linear, nn.ReLU)}


def one_after_other(owner: nn.Module, layers: Sequence[nn.Module], x: Tensor) -> Tensor | None:
    """Layers with ReLU after each: `Tensor[N, ...]` -> `Tensor[N, O]`.

    A channels-last map is used as it lies: not the map is reordered but, once, the columns of the first weight.

    Args:
        owner: the module that is called; the weights are remembered as long as it lives.
        x: what `flatten` makes rows of; from `ops.onednn.LINEAR_ROWS` rows on, else None is returned.
    """
    tensors = _tensors(owner, layers, x)
    if tensors is None or not _fit(layers, x[0].numel()):
        return None
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)

    def pack() -> list[onednn.PackedLinear]:
        weights = [layer.weight for layer in layers]
        if last:
            weights[0] = weights[0].unflatten(1, x.shape[1:]).permute(0, 2, 3, 1).flatten(1)
        return [onednn.pack_linear(weight, layer.bias) for weight, layer in zip(weights, layers, strict=True)]

    kind = ("one after other", x.shape[1:], last, torch.get_num_threads())
    packed = remembered(owner).get(tensors, kind, pack)
    with torch.no_grad():
        rows = (x.permute(0, 2, 3, 1) if last else x).flatten(1).contiguous()
        for layer in packed:
            rows = onednn.linear(rows, layer, relu=True)
    return rows


def side_by_side(owner: nn.Module, layers: Sequence[nn.Module], x: Tensor) -> list[Tensor] | None:
    """Layers that read the same rows: `Tensor[N, I]` -> `Tensor[N, O]` of each; `owner` and None as above."""
    tensors = _tensors(owner, layers, x) if x.dim() == 2 else None
    if tensors is None or any(layer.weight.shape[1] != x.shape[1] for layer in layers):
        return None

    def pack() -> onednn.PackedLinear:
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        return onednn.pack_linear(torch.cat(weights), torch.cat(biases))

    packed = remembered(owner).get(tensors, ("side by side", torch.get_num_threads()), pack)
    with torch.no_grad():
        outputs = onednn.linear(x.contiguous(), packed)
    return [part.contiguous() for part in outputs.split([len(layer.weight) for layer in layers], dim=1)]


def with_relu(modules: Sequence[nn.Module]) -> list[nn.Linear]:
    """The layers among `Flatten` and then pairs of a linear layer and ReLU, for `one_after_other`; none if others."""
    flatten, *pairs = modules
    kinds = [nn.Flatten, *[nn.Linear, nn.ReLU] * (len(pairs) // 2)]
    if [type(module) for module in modules] != kinds or (flatten.start_dim, flatten.end_dim) != (1, -1):
        return []
    own = all(is_bare(module) and type(module).forward is _FORWARDS[type(module)] for module in modules)
    return list(pairs[::2]) if own else []


def _tensors(owner: nn.Module, layers: Sequence[nn.Module], x: Tensor) -> list[Tensor] | None:
    """The weights and biases; None: the layers must run themselves."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # nothing below is for a tracer
        return None
    if owner.training:
        forget(owner)
        return None
    if nn.Linear.forward is not _FORWARDS[nn.Linear] or not all(
        type(layer) is nn.Linear and is_bare(layer) for layer in layers
    ):
        return None
    tensors = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
    if not all(isinstance(tensor, Tensor) for tensor in tensors) or len(x) < onednn.LINEAR_ROWS:
        return None
    if not may_stand_in([x], tensors) or x.dtype != torch.float32 or layer_dtype(x) != torch.float32:
        return None
    return tensors if onednn.is_available(torch.float32) else None


def _fit(layers: Sequence[nn.Module], width: int) -> bool:
    """Whether each layer takes what the one before makes; if not, the layers say so themselves."""
    for layer in layers:
        if layer.weight.shape[1] != width:
            return False
        width = layer.weight.shape[0]
    return True
