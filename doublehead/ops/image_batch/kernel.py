"""Triton kernel of the image batch: one launch for each image writes its slot of the batch, padding included."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .arguments import ImageBatchArguments, each_image, empty_batch

#: Pixels of a program's tile; each thread has two.
BLOCK_Y, BLOCK_X, WARPS = 4, 64, 4

#: Sizes and strides differ between images: specialised kernels would be compiled again and again.
_UNSPECIALISED = (
    "height", "width", "new_height", "new_width", "canvas_height", "canvas_width", "stride_c", "stride_y"
)  # fmt: skip


@triton.jit
def _corners(position, size, ratio):
    """The two source indices of output positions, and the weight of the second: half-pixel centres, edges held."""
    source = tl.maximum((position.to(tl.float32) + 0.5) * ratio - 0.5, 0.0)
    first = tl.minimum(source.to(tl.int32), size - 1)
    second = tl.minimum(first + 1, size - 1)
    return first, second, source - first.to(tl.float32)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _resize(
    image, slot, height, width, new_height, new_width, canvas_height, canvas_width, stride_c, stride_y, stride_x,
    ratio_y, ratio_x, levels, gain_0, gain_1, gain_2, bias_0, bias_1, bias_2,
    SWAP: tl.constexpr, ROUNDED: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    x = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    y = tl.program_id(1) * BLOCK_Y + tl.arange(0, BLOCK_Y)
    inside = (y < new_height)[:, None] & (x < new_width)[None, :]
    canvas = (y < canvas_height)[:, None] & (x < canvas_width)[None, :]
    top, bottom, weight_y = _corners(y, height, ratio_y)
    left, right, weight_x = _corners(x, width, ratio_x)
    if WIDE:  # offsets beyond 2**31
        y, x, top, bottom, left, right = (
            y.to(tl.int64), x.to(tl.int64), top.to(tl.int64), bottom.to(tl.int64), left.to(tl.int64), right.to(tl.int64)
        )  # fmt: skip
    top, bottom = (top * stride_y)[:, None], (bottom * stride_y)[:, None]
    left, right = (left * stride_x)[None, :], (right * stride_x)[None, :]
    weight_y, weight_x = weight_y[:, None], weight_x[None, :]
    pixel = y[:, None] * canvas_width + x[None, :]
    plane = canvas_width.to(pixel.dtype) * canvas_height
    for channel in tl.static_range(3):
        source = image + (2 - channel if SWAP else channel) * stride_c.to(pixel.dtype)
        # Spelt out, so that products and sums round as in PyTorch's interpolate.
        upper = (1 - weight_x) * tl.load(source + top + left, mask=inside, other=0).to(tl.float32)
        upper += weight_x * tl.load(source + top + right, mask=inside, other=0).to(tl.float32)
        lower = (1 - weight_x) * tl.load(source + bottom + left, mask=inside, other=0).to(tl.float32)
        lower += weight_x * tl.load(source + bottom + right, mask=inside, other=0).to(tl.float32)
        value = (1 - weight_y) * upper + weight_y * lower
        if ROUNDED:
            value = tl.floor(value * levels + 0.5)
            value = tl.minimum(tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL), 255.0, tl.PropagateNan.ALL)
        gain = gain_0 if channel == 0 else (gain_1 if channel == 1 else gain_2)
        bias = bias_0 if channel == 0 else (bias_1 if channel == 1 else bias_2)
        value = tl.where(inside, value * gain + bias, 0.0)
        offset = pixel * 3 + channel if CHANNELS_LAST else pixel + channel * plane
        tl.store(slot + offset, value, mask=canvas)  # rounds to the batch's dtype


def image_batch(args: ImageBatchArguments) -> Tensor:
    """Launches the kernel for each image."""
    _, _, height, width, mean, std, swap, rounded, dtype, channels_last = args
    if dtype == torch.float64:
        return reference.image_batch(args)
    batch = empty_batch(args)
    grid = (triton.cdiv(width, BLOCK_X), triton.cdiv(height, BLOCK_Y))
    for slot, (image, new_height, new_width) in zip(batch, each_image(args), strict=True):
        white = reference.white_of(image, rounded)
        _resize[grid](
            image, slot, *image.shape[1:], new_height, new_width, height, width, *image.stride(),
            image.shape[1] / new_height, image.shape[2] / new_width, float(white // reference.white_of(image, False)),
            *(1 / (white * value) for value in std), *(-m / s for m, s in zip(mean, std, strict=True)),
            SWAP=swap, ROUNDED=rounded, CHANNELS_LAST=channels_last, WIDE=_wide(image, slot),
            BLOCK_Y=BLOCK_Y, BLOCK_X=BLOCK_X, num_warps=WARPS,
        )  # fmt: skip
    return batch


def _wide(image: Tensor, slot: Tensor) -> bool:
    """Whether offsets exceed 32 bits.  The reach of a view decides, not its number of elements."""
    reach = sum((size - 1) * stride for size, stride in zip(image.shape, image.stride(), strict=True))
    return max(reach, slot.numel()) >= 2**31 - 2**16  # a tile may count beyond the canvas before it is masked
