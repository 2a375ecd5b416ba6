"""The products of a tower that runs layer by layer at inference: in float, in 8 bits, or in float and recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from ..ops import int8, onednn
from ..ops.int8 import Grid, reference

SIZES = 2
"""For how many sizes of its input a layer keeps packed weights: those of a batch's full chunks and of its last one."""


class Layer(NamedTuple):
    """A product of a tower: a convolution that keeps the size, with the batch norm after it, or a linear layer."""

    name: str
    """In the tower."""
    signed: bool
    """Whether its input can be negative: it does not follow a ReLU."""
    fold: Callable[[], tuple[Tensor, Tensor]]
    """Makes the weight `Tensor[O, I, k, k]`, k odd, and the bias `Tensor[O]`, with the batch norm in them."""
    added: bool = False
    """Whether it is run by `Product.add`; then k is 1."""
    by_map: bool = False
    """Whether in 8 bits each map of its input gets a scale of its own, when it runs (see `ScaledMaps`)."""


class Product:
    """A layer ready to run, on maps in channels-last memory."""

    grid: Grid | None = None
    """What the integers of its input stand for; None: it takes floats alone."""

    def __call__(self, x: Tensor, relu: bool = False, to: Product | None = None) -> Tensor:
        """`Tensor[N, I, H, W]` -> `Tensor[N, O, H, W]`.

        Args:
            x: float32, or the integers that another product made for this one.
            relu: ReLU after it.
            to: the product that alone takes the result, which then may be integers for it.
        """
        raise NotImplementedError

    def add(self, to: Tensor, x: Tensor, relu: bool = False) -> Tensor:
        """`to + product(x)`, then ReLU, in float32; `to` is used up."""
        raise NotImplementedError

    def prepare(self, x: Tensor) -> Tensor:
        """Float32 as integers, where the product takes them; integers as they are."""
        if self.grid is None or x.dtype == torch.uint8:
            return x
        return int8.quantize(x.permute(0, 2, 3, 1), self.grid).permute(0, 3, 1, 2)


class FloatProduct(Product):
    """In float32 or bfloat16; what comes out is float32."""

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        self._dtype, self._padding = dtype, [weight.shape[-1] // 2] * 2
        self._by_onednn = onednn.is_available(dtype)
        self._weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
        self._bias = bias.to(dtype)
        self._packed: dict[tuple[torch.Size, int], Tensor] = {}

    def __call__(self, x: Tensor, relu: bool = False, to: Product | None = None) -> Tensor:
        x = x.to(self._dtype)
        if self._by_onednn:
            return onednn.convolution(x, self._pack(x), self._bias, padding=self._padding, relu=relu).float()
        y = conv2d(x, self._weight, self._bias, padding=self._padding).float()
        return y.relu_() if relu else y

    def add(self, to: Tensor, x: Tensor, relu: bool = False) -> Tensor:
        if self._by_onednn and self._dtype == torch.float32:
            return onednn.add_convolution(to, x, self._pack(x), self._bias, padding=self._padding, relu=relu)
        y = to.add_(FloatProduct.__call__(self, x))
        return y.relu_() if relu else y

    def _pack(self, x: Tensor) -> Tensor:
        """The weight as oneDNN prefers it for maps of the size of `x`, on this many threads."""
        key = (x.shape, torch.get_num_threads())
        packed = self._packed.pop(key, None)
        if packed is None:
            with torch.inference_mode(False):
                packed = onednn.pack(self._weight, padding=self._padding, size=x.shape)
            while len(self._packed) >= SIZES:
                self._packed.pop(next(iter(self._packed)), None)  # used longest ago; another thread may have done it
        self._packed[key] = packed  # the last to go
        return packed


class RecordedProduct(FloatProduct):
    """In float32, with its inputs recorded."""

    def __init__(self, weight: Tensor, bias: Tensor, record: Callable[[Tensor], None]) -> None:
        super().__init__(weight, bias, torch.float32)
        self._record = record

    def __call__(self, x: Tensor, relu: bool = False, to: Product | None = None) -> Tensor:
        self._record(x)
        return super().__call__(x, relu, to)

    def add(self, to: Tensor, x: Tensor, relu: bool = False) -> Tensor:
        self._record(x)
        return super().add(to, x, relu)


class Int8Product(Product):
    """In 8 bits."""

    def __init__(self, weight: Tensor, bias: Tensor, grid: Grid, added: bool) -> None:
        self.grid = grid
        self._packed = int8.pack(weight, bias, grid, added)

    def __call__(self, x: Tensor, relu: bool = False, to: Product | None = None) -> Tensor:
        return int8.product(self.prepare(x), self._packed, relu, _grid_of_result(relu, to))

    def add(self, to: Tensor, x: Tensor, relu: bool = False) -> Tensor:
        return int8.add_product(to, self.prepare(x), self._packed, relu)


class EmulatedProduct(Product):
    """As `Int8Product` on a processor whose sums do not saturate, by integers held in float32.

    These are exact up to 2^24; beyond it the last digit of a sum can decide only which way a tie is rounded.
    """

    def __init__(self, weight: Tensor, bias: Tensor, grid: Grid) -> None:
        self.grid = grid
        self._weight, self._bias = int8.quantize_weight(weight), bias.to(torch.float32)

    def __call__(self, x: Tensor, relu: bool = False, to: Product | None = None) -> Tensor:
        return self._run(x, None, relu, _grid_of_result(relu, to))

    def add(self, to: Tensor, x: Tensor, relu: bool = False) -> Tensor:
        return self._run(x, to, relu, None)

    def _run(self, x: Tensor, residual: Tensor | None, relu: bool, out: Grid | None) -> Tensor:
        q = self.prepare(x)
        y = reference.product(q, self.grid, *self._weight, self._bias, residual, relu, out, dtype=torch.float32)
        return y.contiguous(memory_format=torch.channels_last)


class ScaledMaps(Product):
    """Another product on maps that are first brought to the range of its grid, each by a factor of its own.

    The products of attention grow with the third power of their maps: with one scale for all, those of most RoIs would
    be a few steps high.  (A trained model's relative error of the median RoI, in 7 bits: 0.52, and 0.04 so.)

    Args:
        inner: without bias, on a signed grid with step 1.
        bias: of the layer.
    """

    def __init__(self, inner: Product, bias: Tensor) -> None:
        self._inner, self._bias = inner, bias.view(-1, 1, 1)

    def add(self, to: Tensor, x: Tensor, relu: bool = False) -> Tensor:
        steps = self._inner.grid.top - self._inner.grid.zero
        scale = x.abs().amax((1, 2, 3), keepdim=True) / steps
        scale = torch.where(scale == 0, 1.0, scale)
        y = to.add_(self._bias).addcmul_(self._inner(x / scale), scale)
        return y.relu_() if relu else y


def _grid_of_result(relu: bool, to: Product | None) -> Grid | None:
    """The grid in which a result goes to its only user; None: in float."""
    return to.grid if relu and to is not None else None
