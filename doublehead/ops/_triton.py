"""What the launchers of Triton kernels share: the precision of products, alignment, sizes of tiles, and launching.

Imports torch alone.
"""

from __future__ import annotations

import functools
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


class Launcher:
    """A kernel with its constants, launched as `kernel[grid](*arguments, **constants)` is, in a third of the host's time.

    Triton binds, types and specialises every argument anew at each launch.  Here calls that it would compile alike
    share what it made of the first (`kernel[grid](...)` returns it), and launch that as Triton's tutorials do,
    `compiled[grid](*arguments)`: hooks of profilers are still called.  Where Triton returns nothing, which its
    interpreter does, each call goes the ordinary way; so it does on AMD's GPUs, where Triton looks at sizes too.

    Args:
        kernel: a `triton.jit` function whose constants come last.
        constants: their values by name, in their order, then options of the launch such as `num_warps`.
    """

    def __init__(self, kernel: Any, **constants: Any) -> None:
        self.kernel, self.constants = kernel, constants
        self._values = tuple(value for name, value in constants.items() if name in kernel.arg_names)
        names = kernel.arg_names[len(kernel.arg_names) - len(self._values) :]
        if [name for name in constants if name in kernel.arg_names] != list(names):
            raise ValueError(f"constants must be the kernel's last arguments, {', '.join(names)}, in this order")
        parameters = getattr(kernel, "params", ())  # the interpreter has none
        self._unspecialised = {p.num for p in parameters if p.do_not_specialize}
        self._compiled: dict[tuple, Any] = {}

    def __call__(self, grid: tuple[int, int, int], *arguments: Tensor | int | float | None) -> None:
        """Launches on the current stream of the current device, which must be that of the tensors."""
        key = self._kind(arguments)
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[grid](*arguments, *self._values)
            return
        compiled = self.kernel[grid](*arguments, **self.constants)
        if compiled is not None and torch.version.hip is None:
            self._compiled[key] = compiled

    def _kind(self, arguments: tuple) -> tuple:
        """What calls of one compiled kernel have in common, at least."""
        kind: list[Any] = [arguments[0].device]
        for index, value in enumerate(arguments):
            if isinstance(value, Tensor):
                kind += value.dtype, value.data_ptr() % MULTIPLE == 0
            elif isinstance(value, int) and index in self._unspecialised:
                kind.append(-(2**31) <= value < 2**31)
            elif isinstance(value, int):
                kind.append((value == 1, value % MULTIPLE == 0, -(2**31) <= value < 2**31))
            else:
                kind.append(type(value))
        return tuple(kind)


@functools.cache
def launcher(kernel: Any, **constants: Any) -> Launcher:
    """The one `Launcher` of a kernel with these constants."""
    return Launcher(kernel, **constants)
