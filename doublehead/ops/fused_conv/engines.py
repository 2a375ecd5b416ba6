"""Which library runs a product of the conv-head at inference on a GPU: cuBLAS, cuDNN, or the Triton kernel.

The table follows a count of bytes and operations, fitted to what was measured on an H200 (benchmarks/NOTES.md, "The
conv-head's products").  F operations and B bytes take our Triton kernel 4 us + F / (488 TFLOP/s) + B / (4.2 TB/s),
since a block first computes, and then reads its residual and stores: that gives both 2172 us for the conv-head, where
all was Triton's, and 480 us for the non-local block alone, whose queries, keys and values were cuBLAS's.  cuBLAS does
both at the same time: 4 us + F / (780 TFLOP/s) + half of B / (4.2 TB/s), which fits its published times for products
of this depth. cuDNN may or may not: 4 us + F / (500 to 780 TFLOP/s) + half or all of the bytes. Times beside the
entries are for 1000 RoIs in 16 bits on an H200, predicted all of them. Nothing is chosen by timing when it runs:
results would depend on it.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import torch
from torch import Tensor

from .. import cublas, cudnn
from . import kernel
from .arguments import FusedConvArguments
from .reference import as_maps, as_rows


class Engine(enum.Enum):
    """What runs a product."""

    CUBLAS = "a matrix product that ends with bias and ReLU"
    CUDNN = "a convolution that ends with bias, residual and ReLU"
    TRITON = "the kernel of this package"


class Product(enum.Enum):
    """Kinds of product, by what they need."""

    SPATIAL = "3x3, ReLU"
    ACTIVATED = "1x1, ReLU"
    LINEAR = "1x1"
    JOINED = "1x1 of two inputs, ReLU"
    ADDED = "1x1, residual, ReLU"
    OTHER = "an average over cells, rows that do not count, a residual without ReLU, no bias"


class Rule(NamedTuple):
    """An engine, and the products that it runs."""

    engine: Engine
    dtypes: tuple[torch.dtype, ...]
    capability: tuple[int, int] = (8, 0)
    """From this compute capability on."""
    until: tuple[int, int] = (99, 0)
    """Below this one."""
    rows: int = 0
    """From this number of rows on."""


MOST_ELEMENTS = 2**31
"""cuDNN's kernels count elements in 32 bits."""
HALF = (torch.float16, torch.bfloat16)
FLOAT32 = (torch.float32,)

RULES: dict[Product, tuple[Rule, ...]] = {
    # 256 to 256 channels: 105 to 134 us by Triton, which computes addresses and masks of each tap; 84 to 132.  The
    # least certain entry.
    Product.SPATIAL: (Rule(Engine.CUDNN, HALF + FLOAT32),),
    # 1024 to 256: 87 us; 52.  float32 is cuBLAS's only where PyTorch lets it use the tensor cores.
    Product.ACTIVATED: (Rule(Engine.CUBLAS, HALF + FLOAT32), Rule(Engine.CUDNN, FLOAT32)),
    # Queries, keys and values, 1024 to 1536: 380 us; 231.  In float32 cuDNN's has a pass for the bias of its own, which
    # sm_8x's bandwidth does not pay for.
    Product.LINEAR: (Rule(Engine.CUBLAS, HALF + FLOAT32), Rule(Engine.CUDNN, FLOAT32, capability=(9, 0))),
    # 256 and 256 to 1024: 145 us; 27 for the copy that joins them, and 88.  The copy takes a launch, for which few rows
    # do not pay, nor does the bandwidth of sm_8x and sm_12x for its bytes.
    Product.JOINED: (
        Rule(Engine.CUBLAS, HALF + FLOAT32, capability=(9, 0), until=(12, 0), rows=4500),
        Rule(Engine.CUDNN, FLOAT32, capability=(9, 0), until=(12, 0), rows=4500),
    ),
    # 512 to 1024: 165 us; 100 to 143.  cuBLAS would need the residual copied into its result first: 48 us.
    Product.ADDED: (Rule(Engine.CUDNN, HALF + FLOAT32),),
    # No library averages cells or counts rows on the device; without ReLU a residual costs PyTorch a pass of its own.
    Product.OTHER: (),
}


def product_of(conv: FusedConvArguments) -> Product:
    """The kind of a product."""
    if conv.mean or conv.count is not None or conv.bias is None:
        return Product.OTHER
    if conv.residual is not None:
        plain = conv.relu and conv.second is None and conv.weight.dim() == 2
        return Product.ADDED if plain else Product.OTHER
    if conv.weight.dim() == 4:
        return Product.SPATIAL if conv.relu else Product.OTHER
    if conv.second is not None:
        return Product.JOINED if conv.relu else Product.OTHER
    return Product.ACTIVATED if conv.relu else Product.LINEAR


def available(device: torch.device, dtype: torch.dtype) -> frozenset[Engine]:
    """The engines that run products of `dtype` on this device; to be asked for once for many products."""
    found = {Engine.TRITON}
    found |= {Engine.CUBLAS} if cublas.is_available(device, dtype) else set()
    return frozenset(found | ({Engine.CUDNN} if cudnn.is_available(device, dtype) else set()))


def choose(conv: FusedConvArguments, capability: tuple[int, int], engines: frozenset[Engine]) -> Engine:
    """The engine for this product on a GPU of this compute capability: the first of the table among `engines`."""
    rows = len(conv.x)
    for rule in RULES[product_of(conv)]:
        if rule.engine not in engines or conv.x.dtype not in rule.dtypes:
            continue
        if rule.engine == Engine.CUDNN and rows * max(conv.weight.shape[:2]) >= MOST_ELEMENTS:
            continue
        if rule.capability <= capability < rule.until and rows >= rule.rows:
            return rule.engine
    return Engine.TRITON


def run(conv: FusedConvArguments, engine: Engine) -> Tensor:
    """The product by `engine`; rows of maps that do not count may be left unwritten.

    The vendors' ReLU may make 0 of NaN, which the Triton kernel's keeps.
    """
    if engine == Engine.TRITON:
        return kernel.fused_conv(conv, fill=False)
    rows = conv.x if conv.second is None else torch.cat((conv.x, conv.second), dim=1)
    if engine == Engine.CUBLAS:
        return cublas.product(rows, conv.weight, conv.bias, conv.relu)
    maps, weight = as_maps(rows, conv.size), _kernel(conv.weight)
    if conv.residual is not None:
        to = as_maps(conv.residual, conv.size)
        return as_rows(cudnn.add_convolution(to, maps, weight, conv.bias, relu=conv.relu))
    padding = (weight.shape[2] // 2,) * 2
    return as_rows(cudnn.convolution(maps, weight, conv.bias, padding=padding, relu=conv.relu))


def _kernel(weight: Tensor) -> Tensor:
    """The weight of a 1x1 convolution in four dimensions; of a 3x3 one as it is."""
    return weight if weight.dim() == 4 else weight[:, :, None, None]
