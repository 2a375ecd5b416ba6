"""The folded conv-head in oneDNN's convolutions: each is one kernel with its bias, residual and ReLU.

A 1x1 convolution takes the cells of all maps as one long map of M x 1 cells, which is a matrix product; of maps of
their own size it would be 2 to 5 % slower.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import onednn, winograd
from ..non_local.reference import non_local_attention
from .arguments import ConvHeadArguments
from .blocks import Block, each_block


class Transformed(NamedTuple):
    """The weight of a 3x3 convolution that runs by Winograd's method, on any number of maps."""

    packed: Tensor
    outputs: int


class FusedBlocks:
    """All blocks and the average, for a few maps at each call: `Tensor[N, C, H, W]` -> `Tensor[N, dim]`.

    Args:
        head: its maps may be any, but of the size and dtype of `head.x`, and without NaN.
        chunk: how many maps most calls have.
        calls: how many calls will have so many.
    """

    def __init__(self, head: ConvHeadArguments, chunk: int, calls: int) -> None:
        self._head, self._chunk = head, chunk
        self._tensors = [self._transform(tensor) for tensor in head.tensors] if calls > 1 else head.tensors
        self._packed = self._pack() if calls > 1 else self._tensors

    def _transform(self, tensor: Tensor) -> Tensor | Transformed:
        """The weight of a 3x3 convolution for Winograd's method, if that pays; others as they are.

        6 ms for 256 channels (Zen 2), of which 32 RoIs save 10: not worth remembering either.
        """
        maps = (self._chunk, *tensor.shape[1:2], *self._head.x.shape[2:])
        if tensor.dim() == 4 and winograd.pays(maps, len(tensor), tensor.dtype):
            return Transformed(winograd.pack(tensor), len(tensor))
        return tensor

    def _pack(self) -> list[Tensor | Transformed]:
        """The weights in oneDNN's layout for a chunk of maps; biases, and what is transformed, as they are.

        8 ms for the 30 MB of K = 5 (Zen 2), 1 % of the work for 100 RoIs: not worth remembering.
        """
        height, width = self._head.x.shape[2:]

        def pack(tensor: Tensor | Transformed) -> Tensor | Transformed:
            if isinstance(tensor, Transformed) or tensor.dim() == 1:
                return tensor
            if tensor.dim() == 4:
                return onednn.pack(tensor, padding=(1, 1), size=(self._chunk, tensor.shape[1], height, width))
            return onednn.pack(_kernel(tensor), size=(1, tensor.shape[1], self._chunk * height * width, 1))

        return [pack(tensor) for tensor in self._tensors]

    def __call__(self, x: Tensor) -> Tensor:
        head, (number, channels, height, width) = self._head, x.shape
        tensors = self._packed if number == self._chunk else self._tensors  # packed for one number of maps
        rows = x.permute(0, 2, 3, 1).reshape(-1, channels)  # a view of channels-last maps

        def conv3(rows: Tensor, weight: Tensor | Transformed, bias: Tensor) -> Tensor:
            maps = rows.view(number, height, width, -1).permute(0, 3, 1, 2)
            if isinstance(weight, Transformed):
                return _rows(winograd.convolution(maps, weight.packed, bias, weight.outputs, relu=True))
            return _rows(onednn.convolution(maps, weight, bias, padding=(1, 1), relu=True))

        # Residuals are added to in place.  The first block is a widening one, so that x is left alone.
        for block, own in each_block(head.blocks, tensors):
            if block == Block.WIDENING:
                both = torch.cat((conv3(rows, own[0], own[1]), rows), dim=1)
                rows = _product(both, own[2], own[3])
            elif block == Block.WIDENING_SHORTCUT_RELU:
                inner = conv3(rows, own[0], own[1])
                rows = _add_product(_product(rows, own[4], own[5]), inner, own[2], own[3])
            elif block == Block.BOTTLENECK:
                inner = conv3(_product(rows, own[0], own[1]), own[2], own[3])
                rows = _add_product(rows, inner, own[4], own[5])
            else:
                qkv = _product(rows, own[0], own[1], relu=False).view(number, height * width, -1)
                mixed = non_local_attention(qkv, head.attention).flatten(0, 1)
                rows = _add_product(rows, mixed, own[2], own[3], relu=head.relu)
        return rows.view(number, height * width, -1).mean(1)


def _product(rows: Tensor, weight: Tensor, bias: Tensor, relu: bool = True) -> Tensor:
    """`relu(rows W^T + bias)`: `Tensor[M, I]` -> `Tensor[M, O]`."""
    return _rows(onednn.convolution(onednn.as_map(rows), _kernel(weight), bias, relu=relu))


def _add_product(to: Tensor, rows: Tensor, weight: Tensor, bias: Tensor, relu: bool = True) -> Tensor:
    """`relu(to + rows W^T + bias)`, in place: `Tensor[M, O]`, which is returned."""
    onednn.add_convolution(onednn.as_map(to), onednn.as_map(rows), _kernel(weight), bias, relu=relu)
    return to


def _kernel(weight: Tensor) -> Tensor:
    """The weight of a 1x1 convolution in four dimensions, as a packed one already is."""
    return weight if weight.dim() == 4 else weight[:, :, None, None]


def _rows(maps: Tensor) -> Tensor:
    """Channels-last maps as rows, `Tensor[N * H * W, C]`.  A view."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])
