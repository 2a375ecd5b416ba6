"""RoIAlign in the cost model: the benchmark's own boxes are replayed, block by block."""

from __future__ import annotations

from typing import NamedTuple

import torch
from model_boxes import BINS, CHANNELS, RATIO, Boxes, boxes_of, distinct, tiles_of
from model_machine import Machine, Step, makespan
from torch import Tensor

# ---------------------------------------------------------------------------------------------
# The kernels of 2026-11-26 (commit 638fdfc), whose times were measured

PROLOGUE = 750
"""Warp instructions of the forward before the first column (sass.py: 745)."""


class Column(NamedTuple):
    """Warp instructions for a column of three pixels, and for one that is still in registers."""

    new: int
    old: int


COLUMN_BEFORE = {4: Column(75, 22), 2: Column(137, 26)}
COLUMN = {4: Column(53, 10), 2: Column(113, 14)}
"""By the bytes of a number; counted with sass.py."""
PLANAR_ROW, PLANAR_OUTPUT = 90, 120
FILL, GATHER_COLUMN = 2000, 99
"""Of the backward: a batch's weights on the slowest warp, by replaying its loops; a box's column of bins (71-99)."""
BATCH = 16


def pixel_latency(machine: Machine, boxes: Boxes) -> float:
    """Of a pixel that some box reads: from memory the first time, else from the L2."""
    read = int((distinct(boxes.rows.flatten(1)) * distinct(boxes.columns.flatten(1))).sum())
    first = boxes.unique_pixels / read
    return first * machine.dram_latency + (1 - first) * machine.l2_latency


def counted(boxes: Boxes, size: int, waste: float, instructions: float) -> str:
    """Bytes: read at least once, from the L2 in all, written; and warp instructions."""
    read = int((distinct(boxes.rows.flatten(1)) * distinct(boxes.columns.flatten(1))).sum()) * waste
    numbers = (boxes.unique_pixels, read, boxes.count * BINS * BINS)
    unique, l2, written = (number * CHANNELS * size / 1e6 for number in numbers)
    return (
        f"{unique:.0f} MB unique, {l2:.0f} MB from the L2, {written:.0f} MB written, "
        f"{instructions / 1e6:.0f} M warp instructions"
    )


def forward_traffic(machine: Machine, boxes: Boxes, size: int, waste: float = 1.0) -> float:
    """The longer of what the L2 and the memory deliver. waste: bytes fetched for a byte used."""
    read = int((distinct(boxes.rows.flatten(1)) * distinct(boxes.columns.flatten(1))).sum()) * waste
    written = boxes.count * BINS * BINS
    l2 = read * CHANNELS * size / machine.l2
    return max(l2, (boxes.unique_pixels * min(waste, 1.2) + written) * CHANNELS * size / machine.dram)


def forward(machine: Machine, count: int, size: int, instructions: dict[int, Column] = COLUMN) -> list[Step]:
    """`pool_channels_last`: a warp goes through the columns of its row of bins; nothing is loaded ahead."""
    boxes, column = boxes_of(count), instructions[size]
    chunks, fit = CHANNELS // (32 * 16 // size), 4
    columns = distinct(boxes.columns.flatten(1))
    one = pixel_latency(machine, boxes) + machine.chain(column.new)
    again = (2 * RATIO * BINS - columns) * machine.chain(column.old)
    blocks = 2 * machine.dram_latency + machine.chain(PROLOGUE) + columns * one + again
    chain = makespan(blocks.repeat_interleave(chunks).tolist(), machine.multiprocessors * fit)
    in_all = (float(columns.sum()) * column.new + boxes.count * PROLOGUE) * chunks * BINS
    counts = counted(boxes, size, 1.0, in_all)
    return [Step("pool", chain + forward_traffic(machine, boxes, size), counts)]


def forward_before(machine: Machine, count: int, size: int) -> list[Step]:
    return forward(machine, count, size, COLUMN_BEFORE)


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
    instructions = float(rounds(columns).sum()) * CHANNELS / channels * threads / 32 * BINS * PLANAR_ROW
    counts = counted(boxes, size, 1.46, instructions)
    return [Step("pool", chain + forward_traffic(machine, boxes, size, waste=1.46), counts)]


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
    # Nothing waits for what is written: other blocks go on.
    written = (boxes.pixels + boxes.count * BINS * BINS) * CHANNELS * size / machine.dram
    listing = -(-boxes.count // 512) * (machine.dram_latency + machine.chain(300))
    return [Step("list", listing), Step("gather", max(makespan(durations, machine.multiprocessors * fit), written))]


# ---------------------------------------------------------------------------------------------
# The planar forward with two channels a lane

TAPS_OF_COLUMN, TAPS_AT_ONCE, OUTPUT = 190, 8, 60
"""Warp instructions: so many taps of a column in two channels, sixteen loads under way (153 to 228); an output (24
to 99)."""


def planar(machine: Machine, count: int, size: int = 4) -> list[Step]:
    """A block has 64 channels of a box; one warp finds out where it lies."""
    boxes, threads, channels, sums, fit = boxes_of(count), 128, 64, 4096, 5
    columns = distinct(boxes.columns.flatten(1))
    some = (sums // (BINS * columns) // 2 * 2).clamp(max=channels)
    full, rest = channels // some, channels % some

    def rounds(each: Tensor | int, of: int = 1) -> Tensor:
        return full * -(-(some // of * each) // threads) + -(-(rest // of * each) // threads)

    parts = -(-distinct(boxes.rows).sum(1) // TAPS_AT_ONCE)
    row = pixel_latency(machine, boxes) + machine.chain(TAPS_OF_COLUMN)
    blocks = 2 * machine.dram_latency + machine.chain(PROLOGUE + 100) + rounds(columns, of=2) * parts * row
    blocks += rounds(BINS * BINS) * machine.chain(OUTPUT) + 3 * (full + 1) * machine.barrier
    chain = makespan(blocks.repeat_interleave(CHANNELS // channels).tolist(), machine.multiprocessors * fit)
    one = float((rounds(columns, of=2) * parts * TAPS_OF_COLUMN + rounds(BINS * BINS) * OUTPUT).sum())
    in_all = one * CHANNELS / channels * threads / 32
    traffic = forward_traffic(machine, boxes, size, waste=1.46)
    return [Step("pool", max(chain, machine.issued(in_all)) + traffic, counted(boxes, size, 1.46, in_all))]


# ---------------------------------------------------------------------------------------------
# The backward in three launches: lists, tables and tiles, sums

BOX_FILL, PIECE, BIN_COLUMN, STAGED_BINS = 200, 110, {4: 92, 2: 78}, 18
"""Warp instructions: a box's weights on a tile (132 to 261); a piece of its bins beside the columns, with two copies
of 45 each; a column of bins, by the bytes of a number; and how many bins a stage holds."""
SLOTS, WARPS, AT_ONCE, ACTIVE = 512, 16, 2, 0.6
"""Blocks for parts of tiles, most of which find nothing to do; warps of a block; blocks of a multiprocessor; the share
of the warps whose row of pixels a box reaches."""
PART = 9


def backward(machine: Machine, count: int, size: int, images: int = 1) -> list[Step]:
    """Weights come from a table. While a piece of a box's bins is added, the next one's gradients are on their way."""
    m, boxes = machine, boxes_of(count, images)
    begin = 4 * m.l2_latency + m.chain(120) + 2 * m.barrier
    durations, pairs, pieces_in_all = [begin / 2] * SLOTS, 0.0, 0.0
    for tiles in tiles_of(boxes):
        number, columns = tiles.boxes, tiles.bin_columns
        batches = (number / BATCH).ceil()
        across = columns / number.clamp(min=1)
        pieces = number * (across * across / STAGED_BINS).ceil().clamp(min=1)
        fill = batches * (3 * m.l2_latency + m.chain(BOX_FILL + 120) + 3 * m.barrier + m.l2_latency + m.chain(60))
        own = m.chain(PIECE) + m.barrier + (across / 2).ceil() * m.chain(BIN_COLUMN[size])
        blocks = begin + fill + pieces * own + 0.3
        parts = (number / PART).floor().clamp(min=1, max=16)  # dense tiles are shared out, and joined
        blocks = torch.where(parts > 1, blocks / parts + 4 * m.l2_latency + m.chain(200), blocks)
        durations += blocks.repeat_interleave(parts.long()).tolist()
        pairs += float(number.sum())
        pieces_in_all += float((pieces * (PIECE + ACTIVE * (across / 2 + 0.5) * BIN_COLUMN[size])).sum())
    written = (boxes.pixels + boxes.count * BINS * BINS) * CHANNELS * size / m.dram
    issued = m.issued(WARPS * (pieces_in_all + len(durations) * 150) + pairs * BOX_FILL)
    chain = makespan(durations, m.multiprocessors * AT_ONCE)
    counts = f"chain {chain:.0f}, issue {issued:.0f}, writing {written:.0f} us; {pairs:.0f} boxes on tiles"
    listing = -(-boxes.count // 512) * (m.dram_latency + m.chain(300))
    longest = max(tiles.listed for tiles in tiles_of(boxes)) / 32
    prepare = max(4 * m.l2_latency + m.chain(450), 2 * m.l2_latency + longest * (m.l2_latency / 4 + m.chain(40)))
    return [Step("list", listing), Step("prepare", prepare), Step("gather", max(chain, issued, written), counts)]
