"""Towers layer by layer at inference on a CPU, where each layer may have a precision of its own (see `quantized`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..ops import NonLocalBlock
from ..ops._library import is_functorch_tensor
from ..ops.conv_head.cpu import CELLS
from ..ops.int8 import Grid, grid_of
from ..ops.non_local.reference import non_local_attention
from .folding import FoldedWeights, layer_dtype
from .products import EmulatedProduct, FloatProduct, Int8Product, Layer, Product, RecordedProduct, ScaledMaps

Products = Mapping[str, Product]


class Layered:
    """How the layers of a tower run, and their weights, prepared.

    Args:
        scales: layer name -> scale of its input, of the layers that run in 8 bits.
        bits: of these inputs: 8 or 7.
        emulated: whether the processor's own products are not used.
        record: takes a layer's name and its input; then all layers run in float32.
    """

    def __init__(
        self,
        scales: Mapping[str, float],
        bits: int = 8,
        emulated: bool = False,
        record: Callable[[str, Tensor], None] | None = None,
    ) -> None:
        self.scales, self.bits, self.emulated, self.record = dict(scales), bits, emulated, record
        self._folded = FoldedWeights()

    def runs(self, x: Tensor) -> bool:
        """Whether inputs like `x` run so; else in float, as if there were no such thing."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        plain = type(x) in (Tensor, nn.Parameter) and not is_functorch_tensor(x)
        return plain and x.numel() > 0 and x.device.type == "cpu" and layer_dtype(x) in (torch.float32, torch.bfloat16)

    def products(self, tower: nn.Module, layers: Sequence[Layer], dtype: torch.dtype) -> Products:
        """Each layer of `tower` ready to run; none where a weight is not finite, which integers would hide.

        `dtype`: of the layers that run in float.
        """
        tensors = [*tower.parameters(), *tower.buffers()]

        def prepare() -> Products:
            if not all(_is_finite(tensor) for tensor in tensors):
                return {}
            return {layer.name: self._product(layer, dtype) for layer in layers}

        return self._folded.get(tensors, dtype, prepare)

    def forget(self) -> None:
        """Free the prepared weights; the next call prepares them again."""
        self._folded.forget()

    def _product(self, layer: Layer, dtype: torch.dtype) -> Product:
        weight, bias = (tensor.to(torch.float32) for tensor in layer.fold())
        if self.record is not None:
            return RecordedProduct(weight, bias, lambda x, record=self.record: record(layer.name, x))
        if layer.name not in self.scales:
            return FloatProduct(weight, bias, dtype)
        if layer.by_map:
            inner = self._int8_product(weight, torch.zeros_like(bias), grid_of(2.0 ** (self.bits - 8), True, self.bits))
            return ScaledMaps(inner, bias)
        grid = grid_of(self.scales[layer.name], layer.signed, self.bits)
        return self._int8_product(weight, bias, grid, layer.added)

    def _int8_product(self, weight: Tensor, bias: Tensor, grid: Grid, added: bool = False) -> Product:
        return EmulatedProduct(weight, bias, grid) if self.emulated else Int8Product(weight, bias, grid, added)


def run_conv(blocks: Sequence[nn.Module], x: Tensor, products: Products, count: Tensor | None) -> Tensor:
    """A conv-head's blocks and the average of each map's cells.

    Args:
        blocks: of the tower.
        x: `Tensor[N, C, H, W]`.
        products: by layer.
        count: as in `Tower`; the rows of the rest are zero.

    Returns:
        `Tensor[N, dim]`, in the dtype that layers have.
    """
    number = len(x) if count is None else min(max(int(count), 0), len(x))
    vectors = x.new_zeros((len(x), blocks[0].shortcut[0].out_channels), dtype=layer_dtype(x))
    together = max(CELLS // (x.shape[2] * x.shape[3]), 1)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for begin in range(0, number, together):
            chunk = x[begin : min(begin + together, number)]
            maps = chunk.to(torch.float32, memory_format=torch.channels_last)
            for index, block in enumerate(blocks):
                maps = _block(index, block, maps, products)
            means = maps.permute(0, 2, 3, 1).flatten(1, 2).mean(1)
            vectors[begin : begin + len(chunk)] = _show_what_is_not_finite(means, chunk)
    return vectors


def _block(index: int, block: nn.Module, x: Tensor, products: Products) -> Tensor:
    """A block on float32 maps, of which it may overwrite all but the first block's."""
    if isinstance(block, NonLocalBlock):
        return _non_local(block, x, products[f"{index}.qkv"], products[f"{index}.out"])
    if index == 0:
        conv3, conv1, shortcut = (products[f"0.{name}"] for name in ("residual.0", "residual.3", "shortcut.0"))
        prepared = conv3.prepare(x)
        y = shortcut(prepared if shortcut.grid == conv3.grid else x, relu=block.shortcut_relu)
        return conv1.add(y, conv3(prepared, relu=True, to=conv1), relu=True)
    narrow, conv3, wide = (products[f"{index}.residual.{place}"] for place in (0, 3, 6))
    return wide.add(x, conv3(narrow(x, relu=True, to=conv3), relu=True, to=wide), relu=True)


def _non_local(block: NonLocalBlock, x: Tensor, qkv: Product, out: Product) -> Tensor:
    """The block with its attention in float32."""
    number, _, height, width = x.shape
    rows = qkv(x).permute(0, 2, 3, 1).reshape(number, height * width, -1)
    mixed = non_local_attention(rows, block.attention(height * width))
    return out.add(x, mixed.view(number, height, width, -1).permute(0, 3, 1, 2), relu=block.relu_after)


def run_fc(x: Tensor, products: Products) -> Tensor:
    """The two fully connected layers: `Tensor[N, C, S, S]` -> `Tensor[N, dim]`, in the dtype that layers have."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        cells = x.to(torch.float32).permute(0, 2, 3, 1).flatten(1)
        first, second = products["1"], products["3"]
        y = second(first(_as_maps(cells), relu=True, to=second), relu=True)
        vectors = _show_what_is_not_finite(y[0, :, :, 0].t(), x)
    return vectors.to(layer_dtype(x)).contiguous()


def _as_maps(rows: Tensor) -> Tensor:
    """Vectors as the cells of one channels-last map: `Tensor[M, C]` -> `Tensor[1, C, M, 1]`."""
    return rows[None, :, None].permute(0, 3, 1, 2)


def _show_what_is_not_finite(vectors: Tensor, x: Tensor) -> Tensor:
    """The vectors of the maps `x`, in place; NaN where a map is not finite: integers and oneDNN's ReLU hide it."""
    if _is_finite(x):
        return vectors
    return vectors.masked_fill_(~x.flatten(1).isfinite().all(1, keepdim=True), torch.nan)


def _is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite, by one pass; the sum of very large ones says no too."""
    return bool(tensor.sum().isfinite())
