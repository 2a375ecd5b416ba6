"""An image batch on the CPU: the reference's arithmetic, at the new size alone and written straight into the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .._dtypes import resizing_dtype
from .reference import memory_format, white_of


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
    """Arguments as in `reference.image_batch`."""
    batch = torch.empty(
        (len(images), 3, height, width),
        dtype=dtype,
        device=images[0].device,
        memory_format=memory_format(channels_last),
    )
    for image, slot, new_height, new_width in zip(images, batch, sizes[::2], sizes[1::2], strict=True):
        values = interpolate(image.to(resizing_dtype(dtype))[None], (new_height, new_width), mode="bilinear")[0]
        if rounded:  # `values` is this function's own, unless nothing had to be computed
            values = values.mul(255 // white_of(image, False)).add_(0.5).floor_().clamp_(0, 255)
        white = white_of(image, rounded)
        for channel in range(3):
            source = values[2 - channel if swap else channel]
            bias = source.new_tensor(-mean[channel] / std[channel])
            target = slot[channel, :new_height, :new_width]
            torch.add(bias, source, alpha=1 / (white * std[channel]), out=target)
        slot[:, :, new_width:] = 0
        slot[:, new_height:, :new_width] = 0
    return batch
