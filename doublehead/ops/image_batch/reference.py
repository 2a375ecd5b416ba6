"""An image batch, defined in plain PyTorch; arguments as `image_batch`'s, sizes flat, all positional."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from .._dtypes import resizing_dtype


def image_batch(
    images: Sequence[Tensor],
    sizes: Sequence[int],
    height: int,
    width: int,
    mean: Sequence[float],
    std: Sequence[float],
    swap: bool,
    rounded: bool,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """`sizes` is (height, width) of the first image, of the second, ..."""
    compute = resizing_dtype(dtype)
    rows = []
    for image, new_height, new_width in zip(images, sizes[::2], sizes[1::2], strict=True):
        white = white_of(image, rounded)
        values = image.to(compute) * (white / white_of(image, False))
        values = interpolate(values[None], (new_height, new_width), mode="bilinear", align_corners=False)[0]
        if rounded:
            values = RoundLevels.apply(values)
        channels = values.flip(0) if swap else values
        normalised = zip(channels / white, mean, std, strict=True)
        pixels = torch.stack([(channel - m) / s for channel, m, s in normalised])  # numbers: no tensor to upload
        rows.append(pad(pixels, (0, width - new_width, 0, height - new_height)))
    return torch.stack(rows).to(dtype, memory_format=memory_format(channels_last))


class RoundLevels(torch.autograd.Function):
    """To the nearest level 0 .. 255, halves up; the gradient passes as if nothing had happened."""

    @staticmethod
    def forward(ctx, levels: Tensor) -> Tensor:
        return (levels + 0.5).floor().clamp(0, 255)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def white_of(image: Tensor, rounded: bool) -> int:
    """The number that stands for white while an image is resized: levels have 255, floating images 1."""
    return 255 if rounded or image.dtype == torch.uint8 else 1


def memory_format(channels_last: bool) -> torch.memory_format:
    """Of the batch."""
    return torch.channels_last if channels_last else torch.contiguous_format
