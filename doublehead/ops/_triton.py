"""What the launchers of Triton kernels share: the precision of products, alignment, sizes of tiles, and launching.

Imports torch alone.
"""

from __future__ import annotations

from typing import Any

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


def blocks(n: int, size: int) -> int:
    """How many blocks of `size` hold `n`.  (`triton.cdiv` takes 4 us on the host.)"""
    return -(-n // size)


def kind_of(*tensors: Tensor | None) -> tuple | None:
    """What Triton specialises a launch on these tensors on, the first being one; None if one is not aligned."""
    kind: list[Any] = [tensors[0].device]
    addresses = 0
    for tensor in tensors:
        if tensor is None:
            kind.append(None)
        else:
            kind.append(tensor.dtype)
            addresses |= tensor.data_ptr()
    return None if addresses % MULTIPLE or torch.version.hip else tuple(kind)


class Launcher:
    """A kernel with its constants, launched as `kernel[grid](*arguments, **constants)` is, in a quarter of the time.

    Triton binds, types and specialises every argument anew at each launch.  Here calls of one `kind` share what it made
    of the first (`kernel[grid](...)` returns it), and launch that as Triton's tutorials do, `compiled[grid](
    *arguments)`: hooks of profilers are still called.  Where Triton returns nothing, as its interpreter does, each call
    goes the ordinary way.

    Args:
        kernel: a `triton.jit` function whose constants come last.
        constants: their values by name, in their order, then options of the launch such as `num_warps`.
    """

    def __init__(self, kernel: Any, **constants: Any) -> None:
        self.kernel, self.constants = kernel, constants
        values = {name: value for name, value in constants.items() if name in kernel.arg_names}
        if list(values) != kernel.arg_names[len(kernel.arg_names) - len(values) :]:
            raise ValueError(f"constants must be the last of {', '.join(kernel.arg_names)}, in this order")
        self._values = tuple(values.values())
        self._compiled: dict[tuple, Any] = {}

    def __call__(self, kind: tuple | None, grid: tuple[int, int, int], *arguments: Tensor | int | float | None) -> None:
        """Launches on the current stream of the current device, which must be that of the tensors.

        Args:
            kind: whatever Triton specialises the call on follows from it: the dtype of each tensor, that all are
                aligned, and what is seen of each number: whether it is 1, a multiple of 16, within 32 bits.  None: the
                call is like no other.
            grid: blocks in three dimensions.
            arguments: of the kernel, in order, without the constants.
        """
        compiled = self._compiled.get(kind)
        if compiled is not None:
            compiled[grid](*arguments, *self._values)
            return
        compiled = self.kernel[grid](*arguments, **self.constants)
        if compiled is not None and kind is not None:
            self._compiled[kind] = compiled
