"""Fully connected layers whose weights are prepared once.

On a CPU by oneDNN's products in float32 (`ops.onednn.linear`), on many rows at once; on CUDA by PyTorch's, on weights
in the dtype that the layers run in, so that autocast converts none of them at each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ...ops import cublas, onednn
from ...ops.cudnn import channel_step
from ..folding import layer_dtype
from .guards import is_bare, may_stand_in
from .networks import forget, remembered

_FORWARDS = {kind: kind.forward for kind in (nn.Flatten, nn.Linear, nn.ReLU)}


def one_after_other(owner: nn.Module, layers: Sequence[nn.Module], x: Tensor) -> Tensor | None:
    """Layers with ReLU after each: `Tensor[N, ...]` -> `Tensor[N, O]`.

    A channels-last map is used as it lies: not the map is reordered but, once, the columns of the first weight.

    Args:
        owner: the module that is called; the weights are remembered as long as it lives.
        x: what `flatten` makes rows of; on a CPU from `ops.onednn.LINEAR_ROWS` rows on, else None is returned.
    """
    tensors = _tensors(owner, layers, x)
    if tensors is None or not _fit(layers, x[0].numel()):
        return None
    products, dtype = PRODUCTS[x.device.type], layer_dtype(x)
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)

    def pack() -> list:
        weights = [layer.weight for layer in layers]
        if last:
            weights[0] = weights[0].unflatten(1, x.shape[1:]).permute(0, 2, 3, 1).flatten(1)
        return [products.pack(weight, layer.bias, dtype) for weight, layer in zip(weights, layers, strict=True)]

    kind = ("one after other", x.shape[1:], last, dtype, torch.get_num_threads())
    packed = remembered(owner).get(tensors, kind, pack)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        rows = (x.permute(0, 2, 3, 1) if last else x).flatten(1).contiguous()
        for layer, weights in zip(layers, packed, strict=True):
            rows = products.multiply(rows.to(dtype), weights, relu=True)[:, : len(layer.weight)]
    return rows


def side_by_side(
    owner: nn.Module, layers: Sequence[nn.Module], x: Tensor, result: torch.dtype | None = None
) -> list[Tensor] | None:
    """Layers that read the same rows: `Tensor[N, I]` -> `Tensor[N, O]` of each; `owner` and None as above.

    `result`: the dtype that the results are given out in; None: that of the layers.
    """
    tensors = _tensors(owner, layers, x) if x.dim() == 2 else None
    if tensors is None or any(layer.weight.shape[1] != x.shape[1] for layer in layers):
        return None

    products, dtype = PRODUCTS[x.device.type], layer_dtype(x)

    def pack() -> Any:
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        return products.pack(torch.cat(weights), torch.cat(biases), dtype)

    packed = remembered(owner).get(tensors, ("side by side", dtype, torch.get_num_threads()), pack)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        outputs = products.multiply(x.to(dtype).contiguous(), packed)
    widths = [len(layer.weight) for layer in layers]
    parts = outputs[:, : sum(widths)].split(widths, dim=1)
    return [part.to(dtype if result is None else result).contiguous() for part in parts]


def predictors(owner: nn.Module, layers: Sequence[nn.Module], x: Tensor) -> list[Tensor] | None:
    """`side_by_side` for the layers that end a head, in float32 at least; None on a CPU, where nothing is gained."""
    if torch.compiler.is_compiling() or not layers or not PRODUCTS.get(x.device.type, OneDNNProducts).converts:
        return None
    return side_by_side(owner, layers, x, torch.promote_types(layer_dtype(x), torch.float32))


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
    if not all(isinstance(tensor, Tensor) for tensor in tensors) or not may_stand_in([x], tensors):
        return None
    return tensors if PRODUCTS[x.device.type].serve(x, layer_dtype(x)) else None


def _fit(layers: Sequence[nn.Module], width: int) -> bool:
    """Whether each layer takes what the one before makes; if not, the layers say so themselves."""
    for layer in layers:
        if layer.weight.shape[1] != width:
            return False
        width = layer.weight.shape[0]
    return True


class Products(Protocol):
    """How the products of a device run."""

    converts: bool
    """Whether prepared weights save more than the products' own time: conversions at each call."""

    def serve(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether they run layers of this dtype on `x`, and gain by it."""

    def pack(self, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Any:
        """`Tensor[O, I]` and `Tensor[O]`, prepared."""

    def multiply(self, x: Tensor, packed: Any, relu: bool = False) -> Tensor:
        """`Tensor[N, I]`, of the layers' dtype -> `Tensor[N, O]`, or wider with columns that mean nothing."""


class OneDNNProducts:
    """Of float32 on a CPU."""

    converts = False

    @staticmethod
    def serve(x: Tensor, dtype: torch.dtype) -> bool:
        return len(x) >= onednn.LINEAR_ROWS and x.dtype == dtype == torch.float32 and onednn.is_available(dtype)

    @staticmethod
    def pack(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> onednn.PackedLinear:
        return onednn.pack_linear(weight, bias)

    @staticmethod
    def multiply(x: Tensor, packed: onednn.PackedLinear, relu: bool = False) -> Tensor:
        return onednn.linear(x, packed, relu)


class CublasProducts:
    """Of any dtype on CUDA; rows of weights are added so that those of the result begin at multiples of 16 bytes."""

    converts = True

    @staticmethod
    def serve(x: Tensor, dtype: torch.dtype) -> bool:
        return True

    @staticmethod
    def pack(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        missing = -len(weight) % channel_step(dtype)
        if not missing:
            return weight.to(dtype), bias.to(dtype)
        return pad(weight.to(dtype), (0, 0, 0, missing)), pad(bias.to(dtype), (0, missing))

    @staticmethod
    def multiply(x: Tensor, packed: tuple[Tensor, Tensor], relu: bool = False) -> Tensor:
        y = cublas.product(x, *packed)
        return y.relu_() if relu else y  # not in the product's kernel, which makes 0 of NaN


PRODUCTS: dict[str, Products] = {"cpu": OneDNNProducts, "cuda": CublasProducts}
