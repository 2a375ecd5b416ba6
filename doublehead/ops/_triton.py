"""What the Triton kernels share: how exact a matrix product is, and sizes of tiles. Imports torch alone."""

from __future__ import annotations

import torch


def dot_precision(dtype: torch.dtype) -> str:
    """The `input_precision` of `tl.dot` for inputs of `dtype`: "tf32" only where the user allowed it for float32.

    Follows `torch.backends.cuda.matmul.fp32_precision` (`allow_tf32`), as PyTorch's own matrix products do.
    """
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least `n`."""
    return 1 << (n - 1).bit_length() if n > 1 else 1
