"""The folded conv-head on the CPU: a few RoIs at a time, in oneDNN's convolutions or in PyTorch's matrix products.

Beside the products, memory costs time on a CPU: new pages for every intermediate map.  So a few RoIs go through all
blocks before the next few, and their maps stay in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import onednn
from .arguments import ConvHeadArguments
from .fused_cpu import FusedBlocks
from .plain_cpu import PlainBlocks

CELLS = 32 * 49
"""Cells at a time, whole maps: of 7 x 7, their widest maps are 32 x 49 x 1536 numbers, 9 MiB in float32."""
FEW = 5 * 49
"""Cells for which the products take less time than it takes to bring the weights into oneDNN's layout."""


def conv_head(head: ConvHeadArguments) -> Tensor:
    """As `reference.conv_head`; RoIs from `count` on are not computed at all."""
    x, count = head.x, head.count
    number = len(x) if count is None else min(max(int(count), 0), len(x))
    vectors = x.new_zeros((len(x), head.tensors[-1].shape[0]))
    chunk = max(CELLS // (x.shape[2] * x.shape[3]), 1)
    with torch.no_grad():
        plain = PlainBlocks(head)
        fuses = number * x.shape[2] * x.shape[3] > FEW and onednn.is_available(x.dtype) and _finite(*head.tensors)
        fused = FusedBlocks(head, chunk, number // chunk) if fuses else None
        for begin in range(0, number, chunk):
            part = slice(begin, min(begin + chunk, number))
            few = x[part, 0].numel() <= FEW
            blocks = plain if fused is None or few or not _finite(x[part]) else fused
            vectors[part] = blocks(x[part])
    return vectors


def _finite(*tensors: Tensor) -> bool:
    """Whether no element is NaN or infinite: oneDNN's ReLU makes 0 of NaN, and what went wrong would not be seen."""
    return all(bool(tensor.sum().isfinite()) for tensor in tensors)
