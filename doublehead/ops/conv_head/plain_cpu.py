"""The folded conv-head in PyTorch's matrix products, in buffers that are reused: any dtype, any processor."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from ..non_local.reference import non_local_attention
from .arguments import ConvHeadArguments
from .blocks import Block, each_block


class PlainBlocks:
    """All blocks and the average, for a few maps of `head.x` at each call: `Tensor[N, C, H, W]` -> `Tensor[N, dim]`."""

    def __init__(self, head: ConvHeadArguments) -> None:
        self._head, self._buffers = head, _Buffers(head.x)

    def __call__(self, x: Tensor) -> Tensor:
        head, buffers, (number, channels, height, width) = self._head, self._buffers, x.shape
        cells = height * width
        rows = x.permute(0, 2, 3, 1).reshape(-1, channels)

        def conv3(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            maps = rows.view(number, height, width, -1).permute(0, 3, 1, 2)
            return conv2d(maps, weight, bias, padding=1).relu_().permute(0, 2, 3, 1).reshape(-1, weight.shape[0])

        def product(name: str, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            out = buffers.rows(name, len(rows), len(weight))
            return torch.addmm(bias, rows, weight.t(), out=out)

        def add_product(rows: Tensor, to: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return to.addmm_(rows, weight.t()).add_(bias)

        def non_local(rows: Tensor, qkv_weight, qkv_bias, out_weight, out_bias) -> Tensor:
            qkv = product("qkv", rows, qkv_weight, qkv_bias).view(number, cells, -1)
            mixed = non_local_attention(qkv, head.attention)
            y = add_product(mixed.view(len(rows), -1), rows, out_weight, out_bias)
            return y.relu_() if head.relu else y

        for block, own in each_block(head.blocks, head.tensors):
            if block == Block.WIDENING:
                both = buffers.rows("both", len(rows), 2 * rows.shape[1])
                torch.cat((conv3(rows, own[0], own[1]), rows), dim=1, out=both)
                rows = product("maps", both, own[2], own[3]).relu_()
            elif block == Block.WIDENING_SHORTCUT_RELU:
                inner = conv3(rows, own[0], own[1])
                rows = add_product(inner, product("maps", rows, own[4], own[5]).relu_(), own[2], own[3]).relu_()
            elif block == Block.BOTTLENECK:
                inner = conv3(product("inner", rows, own[0], own[1]).relu_(), own[2], own[3])
                rows = add_product(inner, rows, own[4], own[5]).relu_()
            else:
                rows = non_local(rows, *own)
        return rows.view(number, cells, -1).mean(1)


class _Buffers:
    """Named memory, allocated once."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._buffers: dict[str, Tensor] = {}

    def rows(self, name: str, rows: int, channels: int) -> Tensor:
        if name not in self._buffers or self._buffers[name].numel() < rows * channels:
            self._buffers[name] = self._like.new_empty(rows * channels)
        return self._buffers[name][: rows * channels].view(rows, channels)
