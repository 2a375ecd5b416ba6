"""What the boxes of the RoIAlign benchmarks read, pixel by pixel and tile by tile, for the cost model."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from inputs import rpn_boxes
from torch import Tensor

STRIDES = (4, 8, 16, 32)
IMAGE = (800, 1344)
CHANNELS, BINS, RATIO = 256, 7, 2


class Boxes:
    """What the boxes of pyramid.py read, pixel by pixel along each axis."""

    def __init__(self, count: int, images: int = 1):
        boxes = [rpn_boxes(count, image_size=IMAGE, seed=image)[0].cpu() for image in range(images)]
        corners = torch.cat(boxes)
        self.images, self.count = images, len(corners)
        self.image = torch.arange(images).repeat_interleave(count)
        side = ((corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])).sqrt()
        self.level = (4 + torch.log2(side / 224) + 1e-6).floor().clamp(2, 5).long() - 2
        scale = 1 / torch.tensor(STRIDES)[self.level]
        self.sizes = [(-(-IMAGE[0] // step), -(-IMAGE[1] // step)) for step in STRIDES]
        extent = torch.tensor(self.sizes)[self.level]
        self.rows = self._pixels(corners[:, 1] * scale, corners[:, 3] * scale, extent[:, 0])
        self.columns = self._pixels(corners[:, 0] * scale, corners[:, 2] * scale, extent[:, 1])

    def _pixels(self, low: Tensor, high: Tensor, extent: Tensor) -> Tensor:
        """`long[K, BINS, 2 * RATIO]`: the pixels that each bin's samples lie between."""
        side = (high - low).clamp(min=1)[:, None] / BINS
        samples = low[:, None] + (torch.arange(RATIO * BINS) + 0.5) / RATIO * side
        samples = torch.minimum(samples.clamp(min=0), (extent - 1)[:, None].to(samples))
        first = samples.floor().long()
        second = torch.where(samples > first, first + 1, first)
        return torch.stack((first, second), 2).reshape(len(low), BINS, 2 * RATIO)

    def window(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """First and last pixel of the rows and of the columns."""
        rows, columns = self.rows.flatten(1), self.columns.flatten(1)
        return rows.amin(1), rows.amax(1), columns.amin(1), columns.amax(1)

    @functools.cached_property
    def unique_pixels(self) -> int:
        total = 0
        for image in range(self.images):
            for level, (height, width) in enumerate(self.sizes):
                touched = torch.zeros(height, width, dtype=torch.bool)
                for k in ((self.level == level) & (self.image == image)).nonzero()[:, 0]:
                    rows, columns = self.rows[k].unique(), self.columns[k].unique()
                    touched[rows[:, None], columns] = True
                total += int(touched.sum())
        return total

    @property
    def pixels(self) -> int:
        return sum(height * width for height, width in self.sizes) * self.images


def distinct(pixels: Tensor) -> Tensor:
    """How many different ones are in each row."""
    ordered = pixels.sort(-1).values
    return (ordered[..., 1:] != ordered[..., :-1]).sum(-1) + 1


@functools.cache
def boxes_of(count: int, images: int = 1) -> Boxes:
    return Boxes(count, images)


class Tiles(NamedTuple):
    """Of each tile of a level and image: how many boxes touch it, columns of bins of theirs; and boxes in the list."""

    boxes: Tensor
    bin_columns: Tensor
    listed: int


TILE = 8


def tiles_of(boxes: Boxes, tile: int = TILE) -> list[Tiles]:
    """Of the coarsest level first, as blocks are numbered."""
    top, _, left, _ = boxes.window()
    result = []
    rows, columns = (
        _bins_in_tiles(pixels, first, tile) for pixels, first in ((boxes.rows, top), (boxes.columns, left))
    )
    for level in reversed(range(len(STRIDES))):
        height, width = boxes.sizes[level]
        down, across = -(-height // tile), -(-width // tile)
        for image in range(boxes.images):
            here = (boxes.level == level) & (boxes.image == image)
            touching, work = torch.zeros(down * across), torch.zeros(down * across)
            for y in range(rows.shape[1]):
                for x in range(columns.shape[1]):
                    both = here & (rows[:, y] > 0) & (columns[:, x] > 0)
                    at = (top[both] // tile + y) * across + left[both] // tile + x
                    touching.index_add_(0, at, torch.ones(len(at)))
                    work.index_add_(0, at, columns[both, x].float())
            result.append(Tiles(touching, work, int(here.sum())))
    return result


def _bins_in_tiles(pixels: Tensor, first: Tensor, tile: int) -> Tensor:
    """`long[K, T]`: how many bins read a pixel of each of the tiles from that of the first pixel on."""
    number = pixels // tile - (first // tile)[:, None, None]
    return torch.stack([(number == t).any(2).sum(1) for t in range(int(number.max()) + 1)], 1)
