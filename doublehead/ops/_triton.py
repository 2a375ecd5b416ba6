"""What the launchers of Triton kernels share: how exact a product is, what a kernel may be given, and sizes of tiles.

Imports torch alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNMENT = 16
"""Of pointers and rows, in bytes: what one load of a thread can fetch at most."""


def convolution_precision(dtype: torch.dtype) -> str:
    """The `input_precision` of `tl.dot` where the product replaces a convolution of `dtype`: "tf32" or "ieee".

    float32 follows `torch.backends.cudnn.conv.fp32_precision`, which is "tf32" unless the user changes it. PyTorch
    itself resolves "none" (what encloses it decides) and the older `torch.backends.cudnn.allow_tf32`.
    """
    return _precision(dtype, torch.backends.cudnn.conv.fp32_precision)


def matmul_precision(dtype: torch.dtype) -> str:
    """The `input_precision` of `tl.dot` where the product replaces a matrix product of `dtype`: "tf32" or "ieee".

    float32 follows `torch.backends.cuda.matmul.fp32_precision`, which is exact unless the user changes it. PyTorch
    itself resolves "none" (what encloses it decides) and the older `torch.backends.cuda.matmul.allow_tf32`.
    """
    return _precision(dtype, torch.backends.cuda.matmul.fp32_precision)


dot_precision = matmul_precision


def _precision(dtype: torch.dtype, switch: str) -> str:
    return "tf32" if dtype == torch.float32 and switch == "tf32" else "ieee"


def aligned(*tensors: Tensor | None) -> bool:
    """Whether pointers and rows (the last dimension) of contiguous tensors are multiples of 16 bytes. None is.

    Elsewhere Triton loads element by element: the kernels then need more registers than there are, and are slower than
    what they replace.
    """
    return all(
        tensor.data_ptr() % ALIGNMENT == 0 and tensor.shape[-1] * tensor.element_size() % ALIGNMENT == 0
        for tensor in tensors
        if tensor is not None
    )


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least `n`."""
    return 1 << (n - 1).bit_length() if n > 1 else 1
