"""What this machine does for products of 8-bit integers."""

from __future__ import annotations

import functools
import platform
import warnings
from typing import Literal, NamedTuple

import torch

from . import reference
from .grid import Grid, grid_of, quantize, quantize_weight
from .op import add_product, pack, product


class Support(NamedTuple):
    """What this processor and this build of PyTorch do for products of 8-bit integers."""

    level: Literal["vnni", "seven_bits", "none"]
    """`vnni`: native, inputs have 8 bits.  `seven_bits`: x86 without VNNI, whose instruction saturates at 16 bits;
    inputs have 7 bits, so that no sum does, with the same scales (steps are twice as large).  `none`: the operators are
    missing."""
    reason: str
    """One line on why, such as "the processor has no VNNI"; empty for `vnni`."""

    @property
    def bits(self) -> int:
        """Of a product's input: 8, 7 or, where there are no products, 0."""
        return {"vnni": 8, "seven_bits": 7, "none": 0}[self.level]


@functools.cache
def int8_support() -> Support:
    """What this machine can do; cheap, and the same for the whole process."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return Support("none", f"8-bit products are for x86 processors, this one is {platform.machine()}")
    if not _has_operators():
        return Support("none", f"PyTorch {torch.__version__} has no 8-bit products of oneDNN")
    if _has_vnni():
        if _is_exact(8):
            return Support("vnni", "")
        why = "oneDNN does not use the processor's VNNI (ONEDNN_MAX_CPU_ISA?)"
    else:
        why = "the processor has no VNNI"
    if _is_exact(7):
        return Support("seven_bits", why)
    return Support("none", f"oneDNN's 8-bit products are not exact on this processor ({platform.processor()})")


def _has_operators() -> bool:
    if not _quantizes():
        return False
    names = "qconv_prepack", "qconv2d_pointwise", "qlinear_prepack", "qlinear_pointwise"
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.onednn, name) for name in names)


def _quantizes() -> bool:
    """Whether PyTorch still makes 8-bit tensors.

    Versions that will give it up (from 2.14 on) warn at the first one, which here is this one: users cannot act on it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return quantize(torch.ones(1), Grid(1.0, 0, 255)).item() == 1
        except (AttributeError, RuntimeError):
            return False


def _has_vnni() -> bool:
    """AVX512-VNNI, AMX, or AVX-VNNI."""
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(known.get(name, False) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))


def _is_exact(bits: int) -> bool:
    """Whether the largest sums of inputs of so many bits are right, in a 3x3 and in a 1x1 convolution."""
    with torch.inference_mode(False), torch.no_grad():
        return all(_largest_sums(kernel, grid_of(1.0, signed, bits)) for kernel in (1, 3) for signed in (False, True))


def _largest_sums(kernel: int, grid: Grid) -> bool:
    weight, bias = torch.ones(64, 64, kernel, kernel), torch.zeros(64)
    weight[1::2] = -1
    q = torch.full((2, 7, 7, 64), grid.top, dtype=torch.uint8).permute(0, 3, 1, 2)
    expected = reference.product(q, grid, *quantize_weight(weight), bias).float()
    to = torch.zeros_like(expected).contiguous(memory_format=torch.channels_last)
    try:
        results = [product(q, pack(weight, bias, grid))]
        if kernel == 1:
            results.append(add_product(to, q, pack(weight, bias, grid, added=True)))
    except (RuntimeError, NotImplementedError):
        return False
    return all(torch.allclose(result, expected) for result in results)
