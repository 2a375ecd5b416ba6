"""Convolutions of oneDNN with bias, residual and ReLU in the same kernel, on packed weights: inference on a CPU.

PyTorch's compiler calls these operators in frozen graphs.  Against `conv2d` they save the passes over the map after it,
the packing of the weights at each call, and, for 1x1 convolutions on channels-last maps, PyTorch's detour by a matrix
product of another library, which is slower on some processors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_available(dtype: torch.dtype = torch.float32) -> bool:
    """Whether this build of PyTorch has them, and this processor them in `dtype`: float32 or bfloat16."""
    built = torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name)
        for name in ("_convolution_pointwise", "_convolution_pointwise_", "_reorder_convolution_weight")
    )
    if dtype == torch.bfloat16:
        return built and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return built and dtype == torch.float32


def pack(
    weight: Tensor,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    size: Sequence[int] | None = None,
) -> Tensor:
    """A weight in the layout that oneDNN prefers.

    The layout depends on the size of the maps.  Packed for another size the weight may be brought into another layout
    at every call, which can take longer than the convolution: 166 ms of 167 (512 to 512 channels, 3x3, AVX2).

    Args:
        weight: `Tensor[O, I, kh, kw]`, float32 or bfloat16, on the CPU.
        stride, padding: of the convolution.
        size: shape of the maps, [N, I, H, W]; None: unknown.

    Returns:
        an opaque tensor for `convolution` and `add_convolution` with the same stride and padding.
    """
    return torch.ops.mkldnn._reorder_convolution_weight(
        weight, list(padding), list(stride), [1, 1], 1, None if size is None else list(size)
    )


def convolution(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    relu: bool = False,
) -> Tensor:
    """Convolution, bias and, with `relu`, ReLU: `Tensor[N, I, H, W]`, channels-last -> `Tensor[N, O, H', W']`."""
    return torch.ops.mkldnn._convolution_pointwise(
        x, packed, bias, list(padding), list(stride), [1, 1], 1, "relu" if relu else "none", [], ""
    )


def add_convolution(
    to: Tensor,
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    relu: bool = False,
) -> Tensor:
    """Add a convolution of `x` to `to` (`Tensor[N, O, H', W']`, channels-last) in place, then ReLU; returns `to`."""
    return torch.ops.mkldnn._convolution_pointwise_.binary(
        to, x, packed, bias, list(padding), list(stride), [1, 1], 1, "add", 1.0, "relu" if relu else None, [], None
    )
