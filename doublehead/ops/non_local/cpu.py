"""The non-local block at inference on a CPU, in float32: oneDNN's convolutions, a few maps at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import onednn
from .attention import Attention
from .reference import non_local_attention

CELLS = 32 * 49
"""Cells at a time, whole maps: their queries, keys and values stay in the cache."""


def serves(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether `non_local` takes these; not where a backward may follow."""
    tensors = [x, *(weight for weight in weights if weight is not None)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    known = all(onednn.serves(tensor, ()) for tensor in tensors)
    return known and x.numel() > 0 and not torch.is_autocast_enabled("cpu")


def non_local(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    attention: Attention,
    relu: bool,
) -> Tensor:
    """As `ops.non_local` without a norm: `Tensor[N, C, H, W]`, channels-last."""
    number, channels, height, width = x.shape
    cells = height * width
    y = torch.empty_like(x, memory_format=torch.channels_last).copy_(x)
    rows = y.permute(0, 2, 3, 1).reshape(number, cells, channels)  # a view
    chunk = max(CELLS // max(cells, 1), 1)
    plain = qkv_weight[:, :, None, None], out_weight[:, :, None, None]
    packed = plain
    if number >= 2 * chunk:
        packed = [onednn.pack(weight, size=(1, weight.shape[1], chunk * cells, 1)) for weight in plain]
    for part in rows.split(chunk):
        qkv_kernel, out_kernel = packed if len(part) == chunk else plain  # packed for one number of cells
        to = onednn.as_map(part.flatten(0, 1))
        qkv = onednn.convolution(to, qkv_kernel, qkv_bias)[0, :, :, 0].t()
        mixed = non_local_attention(qkv.reshape(len(part), cells, -1), attention).flatten(0, 1)
        onednn.add_convolution(to, onednn.as_map(mixed), out_kernel, out_bias)
    return y.relu_() if relu else y  # not oneDNN's, which makes 0 of NaN
