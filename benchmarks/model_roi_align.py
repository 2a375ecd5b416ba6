"""RoIAlign in the cost model: the benchmark's own boxes are replayed, block by block."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from inputs import rpn_boxes
from model_machine import Machine, Step, makespan
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


# ---------------------------------------------------------------------------------------------
# The kernels of 2026-11-26 (commit 638fdfc), whose times were measured

PROLOGUE, NEW_COLUMN, NEW_COLUMN_16, OLD_COLUMN = 750, 100, 150, 22
"""Warp instructions of the forward: before the first column; a column of three pixels; one that is still in registers.
(sass.py: 745; 22 to 460, most of which are its variants for 1 to 4 pixels.)"""
PLANAR_ROW, PLANAR_OUTPUT = 90, 120
FILL, GATHER_COLUMN = 2000, 90
"""Of the backward: a batch's weights on the slowest warp, by replaying its loops; a box's column of bins (71-99)."""
TILE, BATCH = 8, 16


def pixel_latency(machine: Machine, boxes: Boxes) -> float:
    """Of a pixel that some box reads: from memory the first time, else from the L2."""
    read = int((distinct(boxes.rows.flatten(1)) * distinct(boxes.columns.flatten(1))).sum())
    first = boxes.unique_pixels / read
    return first * machine.dram_latency + (1 - first) * machine.l2_latency


def forward_traffic(machine: Machine, boxes: Boxes, size: int, waste: float = 1.0) -> float:
    """The longer of what the L2 and the memory deliver. waste: bytes fetched for a byte used."""
    read = int((distinct(boxes.rows.flatten(1)) * distinct(boxes.columns.flatten(1))).sum()) * waste
    written = boxes.count * BINS * BINS
    l2 = read * CHANNELS * size / machine.l2
    return max(l2, (boxes.unique_pixels * min(waste, 1.2) + written) * CHANNELS * size / machine.dram)


def forward_before(machine: Machine, count: int, size: int) -> list[Step]:
    """`pool_channels_last`: a warp goes through the columns of its row of bins; nothing is loaded ahead."""
    boxes = boxes_of(count)
    chunks, fit = CHANNELS // (32 * 16 // size), 4
    columns = distinct(boxes.columns.flatten(1))
    one = pixel_latency(machine, boxes) + machine.chain(NEW_COLUMN if size == 4 else NEW_COLUMN_16)
    again = (2 * RATIO * BINS - columns) * machine.chain(OLD_COLUMN)
    blocks = 2 * machine.dram_latency + machine.chain(PROLOGUE) + columns * one + again
    chain = makespan(blocks.repeat_interleave(chunks).tolist(), machine.multiprocessors * fit)
    return [Step("pool", chain + forward_traffic(machine, boxes, size))]


def planar_before(machine: Machine, count: int, size: int = 4) -> list[Step]:
    """`pool_planar`: 128 threads for 32 channels of a box; each combines a column for seven rows, one by one."""
    boxes, threads, channels, sums, fit = boxes_of(count), 128, 32, 4096, 6
    columns = distinct(boxes.columns.flatten(1))
    some = (sums // (BINS * columns)).clamp(max=channels)
    full, rest = channels // some, channels % some

    def rounds(each: Tensor | int) -> Tensor:
        return full * -(-(some * each) // threads) + -(-(rest * each) // threads)

    row = pixel_latency(machine, boxes) + machine.chain(PLANAR_ROW)
    blocks = 2 * machine.dram_latency + machine.chain(PROLOGUE) + rounds(columns) * BINS * row
    blocks += rounds(BINS * BINS) * machine.chain(PLANAR_OUTPUT) + 2 * (full + 1) * machine.barrier
    chain = makespan(blocks.repeat_interleave(CHANNELS // channels).tolist(), machine.multiprocessors * fit)
    return [Step("pool", chain + forward_traffic(machine, boxes, size, waste=1.46))]


class Tiles(NamedTuple):
    """Of each tile of a level and image: how many boxes touch it, columns of bins of theirs; and boxes in the list."""

    boxes: Tensor
    bin_columns: Tensor
    listed: int


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


def backward_before(machine: Machine, count: int, size: int, images: int = 1) -> list[Step]:
    """`gather_channels_last`: a block makes the weights of the boxes on its tile and goes through their bins, column by
    column, and waits for the L2 in each."""
    boxes, chunks, fit = boxes_of(count, images), CHANNELS // 128, 2
    column = machine.l2_latency + machine.chain(GATHER_COLUMN)
    fill = machine.chain(FILL) + 2 * machine.barrier
    durations: list[float] = []
    for tiles in tiles_of(boxes):
        look = -(-tiles.listed // 256) * (machine.l2_latency + 2 * machine.barrier + machine.chain(60))
        base = machine.dram_latency + look + machine.chain(120) + 0.3
        blocks = base + (tiles.boxes / BATCH).ceil() * fill + tiles.bin_columns * column
        durations += blocks.repeat_interleave(chunks).tolist()
    written = (boxes.pixels + boxes.count * BINS * BINS) * CHANNELS * size / machine.dram
    listing = -(-boxes.count // 512) * (machine.dram_latency + machine.chain(300))
    return [Step("list", listing), Step("gather", makespan(durations, machine.multiprocessors * fit) + written)]
