"""Convolutions of cuDNN with bias, residual and ReLU in the same kernel: inference on a GPU.

PyTorch's own convolution launches the bias, the sum and the ReLU after it, and each reads and writes the whole map.
The operators called here (`aten::cudnn_convolution_relu`, `aten::cudnn_convolution_add_relu`) are those of PyTorch's
frozen graphs.  They exist in every build and have a kernel where CUDA is built; they follow
`torch.backends.cudnn.conv.fp32_precision` and `torch.backends.cudnn.benchmark`, and always end in a ReLU: what has none
goes through PyTorch's convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from ._fallback import warn_fallback

DEVICES = ("cuda",)
"""Types of device that have the fused operators."""

_BITS = 2**31
"""cuDNN's fused kernels count elements in 32 bits; PyTorch looks after that in its own convolution alone."""


def is_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether convolutions on tensors of `dtype` on this device run in one kernel.

    In float32 only on the tensor cores (`torch.backends.cudnn.conv.fp32_precision` "tf32"): without them cuDNN need not
    have a fused kernel.  Not where PyTorch is set to be deterministic, which the fused operators do not read.
    """
    if device.type not in DEVICES or torch.version.hip is not None or not torch.backends.cudnn.is_available():
        return False
    if not torch.backends.cudnn.enabled or torch.backends.cudnn.deterministic:
        return False
    if torch.are_deterministic_algorithms_enabled():
        return False
    if dtype == torch.float32:
        return torch.backends.cudnn.conv.fp32_precision == "tf32"
    return dtype in (torch.float16, torch.bfloat16)


def channel_step(dtype: torch.dtype) -> int:
    """What numbers of channels must be multiples of, 16 bytes: others have no kernel on the tensor cores."""
    return 4 if dtype == torch.float32 else 8


def serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether this call runs in one kernel, if it has a ReLU; without a bias it does not."""
    step = channel_step(x.dtype)
    outputs, inputs = weight.shape[:2]
    largest = x.shape[0] * x.shape[2] * x.shape[3] * max(inputs, outputs)
    return (
        bias is not None
        and inputs % step == outputs % step == 0
        and 0 < largest < _BITS
        and is_available(x.device, x.dtype)
    )


_UNSERVED: set[tuple] = set()
"""Calls for which cuDNN has no kernel; asking takes long."""
_REFUSALS = ("unable to find an engine", "CUDNN_STATUS_NOT_SUPPORTED", "CUDNN_STATUS_BAD_PARAM")
"""In PyTorch's message: no engine takes the operations, or they cannot be put together."""


def _try(fused: Callable[..., Tensor], x: Tensor, weight: Tensor, *arguments) -> Tensor | None:
    """`fused(x, weight, *arguments)`; None: cuDNN has no kernel for such a call, which is warned of once."""
    if _UNSERVED and _signature(fused, x, weight, arguments) in _UNSERVED:
        return None
    try:
        return fused(x, weight, *arguments)
    except RuntimeError as error:
        if not any(text in str(error) for text in _REFUSALS):
            raise
    _UNSERVED.add(_signature(fused, x, weight, arguments))
    warn_fallback(fused.__name__, "cuDNN has no kernel for these shapes; a newer cuDNN may", x.device.type)
    return None


def _signature(fused: Callable[..., Tensor], x: Tensor, weight: Tensor, arguments: Sequence) -> tuple:
    settings = (str(argument) for argument in arguments if not isinstance(argument, Tensor))
    return fused.__name__, x.device, x.dtype, x.shape, weight.shape, *settings


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    relu: bool = False,
) -> Tensor:
    """Convolution, bias and, with `relu`, ReLU: `Tensor[N, I, H, W]` -> `Tensor[N, O, H', W']`, new memory.

    In one kernel where `serves` says so and a ReLU is wanted, else in plain PyTorch.  ReLU may make 0 of NaN in the
    former, which PyTorch's keeps.

    Args:
        x: channels-last; of any other layout it is copied.
        weight: `Tensor[O, I, kh, kw]`, channels-last, of the dtype of `x`.
        bias: `Tensor[O]` of that dtype.  Whoever has none and wants one kernel gives zeros, made once.
    """
    if relu and serves(x, weight, bias):
        fused = torch.ops.aten.cudnn_convolution_relu
        y = _try(fused, x, weight, bias, list(stride), list(padding), [1, 1], 1)
        if y is not None:
            return y
    y = conv2d(x, weight, bias, tuple(stride), tuple(padding))
    return y.relu_() if relu else y


def add_convolution(
    to: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    relu: bool = False,
) -> Tensor:
    """`to` plus a convolution of `x`, then ReLU: as `convolution`, with `to` channels-last, of the result's shape.

    Returns:
        new memory; `to` is left as it is.
    """
    if relu and to.data_ptr() != x.data_ptr() and serves(x, weight, bias):  # cuDNN wants them in different memory
        fused = torch.ops.aten.cudnn_convolution_add_relu
        y = _try(fused, x, weight, to, 1.0, bias, list(stride), list(padding), [1, 1], 1)
        if y is not None:
            return y
    y = conv2d(x, weight, bias, tuple(stride), tuple(padding)).add_(to)
    return y.relu_() if relu else y
