"""The folded conv-head in plain PyTorch: the definition, for any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from ..non_local.attention import Attention
from ..non_local.reference import non_local_attention
from .arguments import ConvHeadArguments
from .blocks import Block, each_block


def conv_head(head: ConvHeadArguments) -> Tensor:
    """Block after block on maps `Tensor[N, C, H, W]`, then the average of each map's cells: `Tensor[N, dim]`."""
    x = head.x
    apply = {
        Block.WIDENING: _widening,
        Block.WIDENING_SHORTCUT_RELU: _widening_shortcut_relu,
        Block.BOTTLENECK: _bottleneck,
        Block.NON_LOCAL: lambda x, *own: _non_local(x, *own, head.attention, head.relu),
    }
    for block, own in each_block(head.blocks, head.tensors):
        x = apply[block](x, *own)
    vectors = x.mean((2, 3))
    if head.count is None:
        return vectors
    return torch.where(torch.arange(len(vectors), device=x.device)[:, None] < head.count, vectors, 0.0)


def _conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if weight.dim() == 2:
        return conv2d(x, weight[:, :, None, None], bias)
    return conv2d(x, weight, bias, padding=1)


def _widening(x, weight3, bias3, weight, bias):
    return _conv(torch.cat((_conv(x, weight3, bias3).relu(), x), dim=1), weight, bias).relu()


def _widening_shortcut_relu(x, weight3, bias3, weight1, bias1, shortcut_weight, shortcut_bias):
    shortcut = _conv(x, shortcut_weight, shortcut_bias).relu()
    return (_conv(_conv(x, weight3, bias3).relu(), weight1, bias1) + shortcut).relu()


def _bottleneck(x, weight1, bias1, weight3, bias3, weight2, bias2):
    inner = _conv(_conv(x, weight1, bias1).relu(), weight3, bias3).relu()
    return (_conv(inner, weight2, bias2) + x).relu()


def _non_local(x, qkv_weight, qkv_bias, out_weight, out_bias, attention: Attention, relu: bool):
    qkv = _conv(x, qkv_weight, qkv_bias).flatten(2).transpose(1, 2).contiguous()  # [N, H*W, 3*D]
    mixed = non_local_attention(qkv, attention)
    mixed = mixed.transpose(1, 2).reshape(len(x), mixed.shape[2], *x.shape[2:])
    y = _conv(mixed, out_weight, out_bias) + x
    return y.relu() if relu else y
