"""What the launchers of Triton kernels share: the precision of products, alignment, and sizes of tiles.

Imports torch alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLE = 16
"""Triton loads 16 bytes at once if pointers (in bytes) and widths (in elements) are multiples of this."""


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


def _precision(dtype: torch.dtype, switch: str) -> str:
    return "tf32" if dtype == torch.float32 and switch == "tf32" else "ieee"


UNALIGNED = (
    "a number of channels is no multiple of 16, or a tensor begins at an address that is none; the kernel would load "
    "element by element and be slower"
)
"""The reason for a `Fallback` if the arguments are not `aligned`."""


def aligned(*values: Tensor | int | None) -> bool:
    """Whether widths (ints) are multiples of 16 and tensors begin at multiples of 16 bytes.  None is aligned.

    Otherwise Triton loads element by element: kernels with matrix products then spill registers, and are slower than
    what they replace.
    """
    return all(
        (value.data_ptr() if isinstance(value, Tensor) else value) % MULTIPLE == 0
        for value in values
        if value is not None
    )


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << (n - 1).bit_length() if n > 1 else 1
