"""Where Winograd's convolution takes the place of the direct one."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence

import torch

from .. import _library
from .reference import OUTPUTS

CHANNELS = 64
"""Of input and output, at least.  Rounding errors are 3 times the direct convolution's with 8 channels, 2.2 times with
32, 1.7 times with 64, 1.2 times with 128, and less than its own with 256 or more."""
TILES = 32
"""At least: the transformed weights are four times as large, and with few tiles it takes longer to read them than to
multiply."""


def pays(size: Sequence[int], outputs: int, dtype: torch.dtype) -> bool:
    """Whether it is faster than oneDNN's and about as exact, for maps of `size` `[N, I, H, W]`."""
    number, inputs, height, width = size
    tiles = number * -(-height // OUTPUTS) * -(-width // OUTPUTS)
    return dtype == torch.float32 and min(inputs, outputs) >= CHANNELS and tiles >= TILES and _is_fast_here()


@functools.cache
def _is_fast_here() -> bool:
    """Whether the kernel is built, and runs with AVX2: with AVX-512 the direct one has registers twice as wide."""
    if "_C" in _library.UNLOADED or not _library.native("winograd", "cpu"):
        return False
    return "AVX2" in importlib.import_module("doublehead._C").build_info()["instruction_set"]
