"""Convolutions of oneDNN with bias, residual and ReLU in the same kernel, on packed weights: inference on a CPU.

PyTorch's compiler calls these operators in frozen graphs.  Against `conv2d` they save the passes over the map after it,
the packing of the weights at each call, and, for 1x1 convolutions on channels-last maps, PyTorch's detour by a matrix
product of another library, which is slower on some processors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ._library import in_dispatch_mode, is_functorch_tensor


def is_available(dtype: torch.dtype = torch.float32) -> bool:
    """Whether this build of PyTorch has them, and this processor them in `dtype`: float32 or bfloat16."""
    built = torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name)
        for name in ("_convolution_pointwise", "_convolution_pointwise_", "_reorder_convolution_weight")
    )
    if dtype == torch.bfloat16:
        return built and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return built and dtype == torch.float32


def serves(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether these functions may take the place of PyTorch's layers in float32; gradients are the caller's to ask for.

    Not where more is wanted than the result (a trace, a derivative, a transform, a count of FLOPs), nor on weights of
    inference mode, whose changes cannot be seen, so that nothing made of them can be remembered.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or in_dispatch_mode() or forward_ad._current_level >= 0:
        return False
    plain = all(
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.dtype == torch.float32
        and not is_functorch_tensor(tensor)
        for tensor in (x, *weights)
    )
    return plain and is_available(torch.float32) and not any(tensor.is_inference() for tensor in weights)


def pack(
    weight: Tensor,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    size: Sequence[int] | None = None,
) -> Tensor:
    """A weight in the layout that oneDNN prefers.

    The layout follows from the shape of the input and the number of threads.  With others the results are right, but
    the weight may be reordered at every call, from one packed layout to another, which can take several times as long
    as the convolution (24 to 32 channels a block: 325 ms, the product 80).  So give `size` wherever the shape is known;
    for a shape that comes once, the convolutions take the plain weight as well, which is reordered fast.

    Args:
        weight: `Tensor[O, I, kh, kw]`, float32 or bfloat16, on the CPU.
        size: of the input, `[N, I, H, W]`; None: oneDNN's guess.

    Returns:
        an opaque tensor for `convolution` and `add_convolution` with the same stride and padding.
    """
    size = None if size is None else list(size)
    return torch.ops.mkldnn._reorder_convolution_weight(weight, list(padding), list(stride), [1, 1], 1, size)


def convolution(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    relu: bool = False,
) -> Tensor:
    """Convolution, bias and, with `relu`, ReLU: `Tensor[N, I, H, W]`, channels-last -> `Tensor[N, O, H', W']`.

    `packed` is a plain weight or one from `pack`.  ReLU makes 0 of NaN, which PyTorch's keeps: whoever fuses it looks
    for NaN before, or nobody will see that a model is broken.  Both hold for `add_convolution` too.
    """
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


LINEAR_ROWS = 500
"""Rows of a product at a time: packed weights serve one number of rows."""
LINEAR_OVERLAP = 0.2
"""Share of a block's rows that may be computed twice, so that the last rows make a full block."""
LINEAR_COLUMNS = 896
"""Input channels at a time, so that a block of weights stays in the cache."""


class PackedLinear(NamedTuple):
    """The weights of a fully connected layer in float32, for `linear`."""

    weight: Tensor
    """`Tensor[O, I]`: as it is, for the last rows."""
    bias: Tensor
    """`Tensor[O]`"""
    blocks: list[Tensor]
    """Packed: `LINEAR_COLUMNS` columns of the weight each."""


def pack_linear(weight: Tensor, bias: Tensor) -> PackedLinear:
    """The weights `Tensor[O, I]` and `Tensor[O]` for `linear`.

    16-bit weights belong to PyTorch's own `linear`: the sum over blocks of columns would be rounded after each.
    """
    blocks = weight.detach().split(LINEAR_COLUMNS, dim=1)
    packed = [pack(block[:, :, None, None].contiguous(), size=(1, block.shape[1], LINEAR_ROWS, 1)) for block in blocks]
    return PackedLinear(weight, bias, packed)


def linear(x: Tensor, packed: PackedLinear, relu: bool = False) -> Tensor:
    """A fully connected layer and, with `relu`, ReLU: `Tensor[M, I]` -> `Tensor[M, O]`, in float32, without a gradient.

    Blocks of rows and columns, each product a 1x1 convolution that adds to the result in place.  The last `M %
    LINEAR_ROWS` rows make a full block with a few of those before; where it would be many, they go through PyTorch's
    `linear`.
    """
    y = x.new_empty((len(x), len(packed.weight)))
    split = len(x) // LINEAR_ROWS * LINEAR_ROWS
    begins = list(range(0, split, LINEAR_ROWS))
    if split and 0 < split + LINEAR_ROWS - len(x) <= LINEAR_OVERLAP * LINEAR_ROWS:
        begins.append(len(x) - LINEAR_ROWS)
        split = len(x)
    for begin in begins:
        rows, to = x[begin : begin + LINEAR_ROWS], y[begin : begin + LINEAR_ROWS]
        to.copy_(packed.bias)
        columns = rows.split(LINEAR_COLUMNS, dim=1)
        for block, part in zip(packed.blocks, columns, strict=True):
            add_convolution(as_map(to), as_map(part), block, None)
    if split < len(x):
        torch.addmm(packed.bias, x[split:], packed.weight.t(), out=y[split:])
    return y.relu_() if relu else y  # not oneDNN's, which makes 0 of NaN


def as_map(rows: Tensor) -> Tensor:
    """Rows `Tensor[M, C]` as one map of M x 1 cells, channels-last: `Tensor[1, C, M, 1]`.  A view."""
    return rows[None, :, None, :].permute(0, 3, 1, 2)  # with the strides by which PyTorch knows channels-last maps
