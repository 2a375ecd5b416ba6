"""The image batch in plain PyTorch: the definition, for any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from .._dtypes import resizing_dtype
from .arguments import ImageBatchArguments, each_image, memory_format


def image_batch(args: ImageBatchArguments) -> Tensor:
    """The batch, `Tensor[B, 3, height, width]`."""
    _, _, height, width, mean, std, swap, rounded, dtype, channels_last = args
    compute = resizing_dtype(dtype)
    rows = []
    for image, new_height, new_width in each_image(args):
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
    """Rounds to the nearest level 0 .. 255, halves up; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx, levels: Tensor) -> Tensor:
        return (levels + 0.5).floor().clamp(0, 255)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def white_of(image: Tensor, rounded: bool) -> int:
    """The value of white while an image is resized: 255 for levels, 1 for floating images."""
    return 255 if rounded or image.dtype == torch.uint8 else 1
