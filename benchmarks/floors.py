"""The least number of bytes that an operator must read or write: each byte counts once."""

from __future__ import annotations

import torch
from torch import Tensor


def touched(low: Tensor, high: Tensor, bins: int, size: int) -> Tensor:
    """`bool[K, size]`: the pixels along one axis that have a weight, for sides from `low` to `high` on the level.

    Two samples a bin; each lies between two pixels, beyond the outermost one on it, and further out than a pixel
    nowhere. Where samples are more than two pixels apart, those in between are not touched.
    """
    bin_side = (high - low).clamp(min=1)[:, None] / bins
    samples = low[:, None] + (torch.arange(2 * bins, dtype=low.dtype) + 0.5) / 2 * bin_side
    inside = (samples >= -1) & (samples <= size)
    samples = _settled(samples.clamp(0, size - 1))
    first = samples.floor().long()
    second = torch.where(samples > first, first + 1, first)  # on a pixel, its neighbour weighs nothing
    marked = torch.zeros(len(low), size, dtype=torch.bool)
    boxes = torch.arange(len(low))[:, None].expand_as(first)
    for pixels in (first, second):
        marked[boxes[inside], pixels[inside]] = True
    return marked


def resize_touched(old: int, new: int) -> int:
    """How many of `old` pixels along one axis a bilinear resize to `new` reads with a weight."""
    positions = _settled(((torch.arange(new, dtype=torch.float64) + 0.5) * (old / new) - 0.5).clamp(0, old - 1))
    first = positions.floor().long()
    second = torch.where(positions > first, first + 1, first)
    return len(torch.cat((first, second)).unique())


def resize_bytes(size: tuple[int, int], new_size: tuple[int, int], bytes_per_pixel: int) -> int:
    """What resizing one picture reads at least: where it shrinks a lot, not every pixel."""
    return resize_touched(size[0], new_size[0]) * resize_touched(size[1], new_size[1]) * bytes_per_pixel


def _settled(positions: Tensor) -> Tensor:
    """On the pixel where only float64's rounding lies between."""
    whole = positions.round()
    return torch.where((positions - whole).abs() < 1e-9, whole, positions)
