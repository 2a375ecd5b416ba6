"""AP of a trained model with products of its conv-head in emulated fp8 (e4m3), on any device.

    python benchmarks/fp8_accuracy.py RUN [--products qkv] [--scales tensor] [options of doublehead evaluate]

Inputs and weights of the products are rounded to fp8 and back, sums are float32, maps between are bfloat16: what a
GPU's fp8 products compute, but for the order of sums.  Weights have a scale for each output channel.  Inputs have one
for each cell (`row`; a 3x3 convolution: for each RoI) or one for all (`tensor`).  `--products none` rounds maps alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from doublehead.models import conv_tower
from doublehead.ops.conv_head import reference
from doublehead.ops.conv_head.arguments import pack
from doublehead.ops.conv_head.blocks import Block, each_block

LARGEST = torch.finfo(torch.float8_e4m3fn).max
TOGETHER = 64
"""RoIs at a time."""


def rounded(x: Tensor, dims: Sequence[int]) -> Tensor:
    """`x` through fp8, in float32: each part along `dims` scaled so that its largest value is fp8's."""
    scale = x.abs().amax(tuple(dims), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny * LARGEST) / LARGEST
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def convolution(x: Tensor, weight: Tensor, bias: Tensor, scales: str | None) -> Tensor:
    """A product of the conv-head on maps `Tensor[N, C, H, W]`; `scales`: row, tensor, or None: not in fp8."""
    x, weight, bias = x.float(), weight.float(), bias.float()
    weight = weight if weight.dim() == 4 else weight[:, :, None, None]
    spatial = weight.shape[-1] > 1
    if scales is not None:
        weight = rounded(weight, (1, 2, 3))
        x = rounded(x, (0, 1, 2, 3) if scales == "tensor" else (1, 2, 3) if spatial else (1,))
    return conv2d(x, weight, bias, padding=1 if spatial else 0).bfloat16().float()


def conv_head_in(products: str, scales: str):
    """A stand-in for `ops.conv_head`, whose `products` (all, qkv or none) are in fp8."""

    def conv_head(x, tensors, blocks, count=None, *, groups=1, softmax=False, scale=1.0, relu=True) -> Tensor:
        qkv = {id(own[0]) for block, own in each_block(blocks, tensors) if block == Block.NON_LOCAL}
        number = len(x) if count is None else min(int(count), len(x))
        vectors = x.new_zeros(len(x), len(tensors[-1]))
        convolve = reference._conv
        reference._conv = lambda x, weight, bias: convolution(
            x, weight, bias, scales if products == "all" or (products == "qkv" and id(weight) in qkv) else None
        )
        try:
            for begin in range(0, number, TOGETHER):
                part = slice(begin, min(begin + TOGETHER, number))
                (head,) = pack(x[part], tensors, blocks, None, groups, softmax, scale, relu)
                vectors[part] = reference.conv_head(head).to(x.dtype)
        finally:
            reference._conv = convolve
        return vectors

    return conv_head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--products", choices=["all", "qkv", "none"], default="all")
    parser.add_argument("--scales", choices=["row", "tensor"], default="row")
    options, rest = parser.parse_known_args()
    conv_tower.conv_head = conv_head_in(options.products, options.scales)
    from doublehead.cli import main as doublehead

    doublehead(["evaluate", *rest])


if __name__ == "__main__":
    main()
