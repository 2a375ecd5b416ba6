"""A ResNet's first convolution as one over blocks of 2 x 2 pixels: a quarter of the cells with four times the channels.

Three channels fill no kernel of the tensor cores.  Padded to 8 for one, 7 x 7 taps of stride 2 are 392 products a
result, of 5 channels with zeros; here they are 4 x 4 taps of stride 1 over 12 channels padded to 16: 256 products, and
half the bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .layers import Layer


def has_blocks(layer: Layer) -> bool:
    """Whether the layer is of stride 2, with a kernel of 3, 7, 11, ... that leaves a map half as large."""
    side = layer.kernel[0]
    halves = layer.stride == (2, 2) and layer.dilation == (1, 1) and layer.padding == (side // 2, side // 2)
    return halves and layer.kernel == (side, side) and side % 4 == 3 and layer.groups == 1


def padding_of_blocks(layer: Layer) -> tuple[int, int]:
    """Of the convolution over blocks, which come with one row and column of zeros more, at the top and left."""
    return ((layer.padding[0] - 1) // 2,) * 2


def weight_of_blocks(weight: Tensor, step: int) -> Tensor:
    """`Tensor[O, I, k, k]` -> `Tensor[O, C, (k + 1) / 2, (k + 1) / 2]`, channels-last; C: a multiple of `step`."""
    side = (weight.shape[2] + 1) // 2
    blocks = pad(weight, (1, 0, 1, 0)).unflatten(3, (side, 2)).unflatten(2, (side, 2))  # [O, I, side, 2, side, 2]
    channels = blocks.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
    filled = pad(channels, (0, 0, 0, 0, 0, -channels.shape[1] % step))
    return filled.contiguous(memory_format=torch.channels_last)


def blocks_of(x: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """`Tensor[N, I, H, W]` of even sides -> `Tensor[N, channels, H / 2 + 1, W / 2 + 1]`, channels-last."""
    batch, inputs, height, width = x.shape
    sizes = batch, channels, height // 2 + 1, width // 2 + 1
    blocks = torch.empty(sizes, dtype=dtype, device=x.device, memory_format=torch.channels_last).zero_()
    pixels = x.unflatten(3, (width // 2, 2)).unflatten(2, (height // 2, 2)).permute(0, 1, 3, 5, 2, 4)
    blocks[:, : 4 * inputs, 1:, 1:].unflatten(1, (inputs, 2, 2)).copy_(pixels)
    return blocks
