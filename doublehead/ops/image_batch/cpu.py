"""The image batch on the CPU: the reference's arithmetic, only at the new size and written straight into the batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .._dtypes import resizing_dtype
from .arguments import ImageBatchArguments, each_image, empty_batch
from .reference import white_of


def image_batch(args: ImageBatchArguments) -> Tensor:
    """As `reference.image_batch`."""
    batch, rounded = empty_batch(args), args.rounded
    for slot, (image, height, width) in zip(batch, each_image(args), strict=True):
        values = image.to(resizing_dtype(args.dtype))
        values = interpolate(values[None], (height, width), mode="bilinear")[0]
        if rounded:  # `values` is this function's own, unless nothing had to be computed
            values = values.mul(255 // white_of(image, False)).add_(0.5).floor_().clamp_(0, 255)
        white = white_of(image, rounded)
        for channel, (mean, std) in enumerate(zip(args.mean, args.std, strict=True)):
            source = values[2 - channel if args.swap else channel]
            bias = source.new_tensor(-mean / std)
            torch.add(bias, source, alpha=1 / (white * std), out=slot[channel, :height, :width])
        slot[:, :, width:] = 0
        slot[:, height:, :width] = 0
    return batch
