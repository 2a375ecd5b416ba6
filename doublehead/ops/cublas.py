"""Matrix products of cuBLAS that end with their bias and ReLU: inference on a GPU.

`aten::_addmm_activation` is PyTorch's own operator for the epilogues of cuBLASLt, called by its compiler.  Against
`linear` and `relu` it saves one pass over the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import convolution_precision, matmul_precision

DEVICES = ("cuda",)
"""Types of device that have the fused operator."""


def is_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `product` may take the place of 1x1 convolutions of `dtype` on this device.

    In float32 only where PyTorch's switches allow TF32 to both, as matrix products follow one and convolutions another.
    Not where PyTorch is set to be deterministic: cuBLAS then wants a variable in the environment.
    """
    if device.type not in DEVICES or torch.version.hip is not None or torch.are_deterministic_algorithms_enabled():
        return False
    if dtype == torch.float32:
        return convolution_precision(dtype) == matmul_precision(dtype) == "tf32"
    return dtype in (torch.float16, torch.bfloat16)


def product(x: Tensor, weight: Tensor, bias: Tensor, relu: bool = False) -> Tensor:
    """`x W^T + bias`, with `relu` ReLU of it, in one kernel: `Tensor[M, I]` -> `Tensor[M, O]`.

    ReLU may make 0 of NaN, which PyTorch's keeps.

    Args:
        x: rows, of any layout that has a unit stride.
        weight: `Tensor[O, I]`.
        bias: `Tensor[O]`.
    """
    if relu:
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=False)
    return torch.addmm(bias, x, weight.t())
