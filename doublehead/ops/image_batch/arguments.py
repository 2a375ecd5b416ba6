"""The arguments of the image batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class ImageBatchArguments(NamedTuple):
    """Images, and how they become a batch; see `image_batch`.

    The fields are the arguments of the operator's schema, in its order.
    """

    images: Sequence[Tensor]
    """Each `Tensor[3, h, w]`."""
    sizes: Sequence[int]
    """(height, width) of the first resized image, of the second, ..."""
    height: int
    width: int
    """`height` and `width` are those of the batch."""
    mean: Sequence[float]
    std: Sequence[float]
    """`mean` and `std` have a number for each of the batch's channels."""
    swap: bool
    """The batch has the channels in reverse order."""
    rounded: bool
    """Resized pixels are rounded to the levels 0 .. 255."""
    dtype: torch.dtype
    """The batch's dtype."""
    channels_last: bool
    """Whether the batch has channels-last memory format."""


def each_image(args: ImageBatchArguments) -> zip:
    """Every image with the height and width that it is resized to."""
    return zip(args.images, args.sizes[::2], args.sizes[1::2], strict=True)


def empty_batch(args: ImageBatchArguments) -> Tensor:
    """The batch `Tensor[B, 3, height, width]`, to be written to."""
    return torch.empty(
        (len(args.images), 3, args.height, args.width),
        dtype=args.dtype,
        device=args.images[0].device,
        memory_format=memory_format(args.channels_last),
    )


def memory_format(channels_last: bool) -> torch.memory_format:
    """The batch's memory format."""
    return torch.channels_last if channels_last else torch.contiguous_format
