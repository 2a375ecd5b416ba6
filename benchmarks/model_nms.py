"""Non-maximum suppression in the cost model: the benchmark's boxes go through the rounds and tiles of the kernels."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from inputs import rpn_boxes
from model_machine import Machine, Step
from torch import Tensor

TILE = 64


class Tile(NamedTuple):
    """A tile of 64 boxes of descending score as it is settled."""

    turns: int
    """The longest chain of suppressions inside it."""
    kept: int
    alive: int
    """Boxes behind it that are undecided before it strikes."""


class Round(NamedTuple):
    """The best undecided boxes, decided among each other."""

    listed: int
    kept: int
    tiles: tuple[Tile, ...]
    rest: int
    """Undecided boxes behind them, which those kept may strike."""


def above(a: Tensor, b: Tensor, threshold: float) -> Tensor:
    """`bool[len(a), len(b)]`: whose IoU exceeds the threshold."""
    low, high = torch.maximum(a[:, None, :2], b[None, :, :2]), torch.minimum(a[:, None, 2:], b[None, :, 2:])
    common = (high - low).clamp(min=0).prod(2)
    areas = [(x[:, 2] - x[:, 0]) * (x[:, 3] - x[:, 1]) for x in (a, b)]
    return common > threshold * (areas[0][:, None] + areas[1] - common)


def settle(suppressed_by: Tensor, alive: Tensor) -> tuple[Tensor, int]:
    """csrc/nms/cuda's `settle`: who of a tile is kept, and in how many turns."""
    undecided, kept, turns = alive.clone(), torch.zeros_like(alive), 0
    while undecided.any():
        clear = undecided & ~(suppressed_by & undecided).any(1)
        kept |= clear
        undecided &= ~(clear | (suppressed_by & kept).any(1))
        turns += 1
    return kept, turns


def decide(boxes: Tensor, threshold: float) -> tuple[Tensor, tuple[Tile, ...]]:
    """Which of the boxes, ordered by score, are kept; and the tiles on the way."""
    alive, kept, tiles = torch.ones(len(boxes), dtype=torch.bool), torch.zeros(len(boxes), dtype=torch.bool), []
    for start in range(0, len(boxes), TILE):
        tile = slice(start, min(start + TILE, len(boxes)))
        inside = above(boxes[tile], boxes[tile], threshold).tril(-1)
        kept[tile], turns = settle(inside, alive[tile])
        behind = alive[tile.stop :]
        tiles.append(Tile(turns, int(kept[tile].sum()), int(behind.sum())))
        behind &= ~above(boxes[tile][kept[tile]], boxes[tile.stop :], threshold).any(0)
    return kept, tuple(tiles)


@functools.cache
def ordered(count: int, seed: int = 0) -> Tensor:
    boxes, scores = rpn_boxes(count, seed=seed)
    return boxes[scores.argsort(descending=True)].cpu()


@functools.cache
def rounds(count: int, threshold: float, chunk: int) -> tuple[Round, ...]:
    """csrc/nms/cuda/rounds.cuh with the boxes of `rpn_boxes(count)`."""
    boxes, found = ordered(count), []
    alive, start = torch.ones(count, dtype=torch.bool), 0
    while start < count and alive[start:].any():
        listed = alive[start:].nonzero()[:chunk, 0] + start
        start = int(listed[-1]) + 1
        kept, tiles = decide(boxes[listed], threshold)
        rest = alive[start:].nonzero()[:, 0] + start
        found.append(Round(len(listed), int(kept.sum()), tiles, len(rest)))
        for some in boxes[listed][kept].split(256):
            alive[rest] &= ~above(some, boxes[rest], threshold).any(0)
            rest = rest[alive[rest]]
    return tuple(found)


@functools.cache
def class_tiles(label: int, each: int, threshold: float) -> tuple[Tile, ...]:
    """The tiles of one class of `eighty_classes(each)`."""
    return decide(ordered(each, label), threshold)[1]


# ---------------------------------------------------------------------------------------------
# CUB's radix sort of 64-bit keys with 32-bit values, as of CUDA 13.0 (cub/device/dispatch/tuning)

SINGLE_TILE, ONESWEEP_TILE = 256 * 9, 384 * 15
SINGLE_PASS, ONESWEEP = 850, 1200
"""Instructions of a pass. sass.py: 927, of which the loop over passes is most; 2,274, half of them for full tiles and
half for others."""


def sort(machine: Machine, count: int, bits: int) -> list[Step]:
    """By 6 bits in one kernel with a loop, or by 8 bits in a kernel each."""
    if count <= SINGLE_TILE:
        passes = math.ceil(bits / 6)
        return [Step("sort", machine.dram_latency + passes * (machine.chain(SINGLE_PASS) + 6 * machine.barrier))]
    passes, tiles = math.ceil(bits / 8), math.ceil(count / ONESWEEP_TILE)
    look_back = (tiles - 1) * machine.l2_latency / 8  # a warp looks back over many tiles at once
    one = machine.chain(ONESWEEP) + 3 * machine.l2_latency + 8 * machine.barrier + look_back
    return [
        *[Step("sort: clear", 0.0)] * 2,
        Step("sort: histogram", machine.chain(400) + machine.l2_latency * 3),
        Step("sort: sums", machine.chain(101) + 2 * machine.l2_latency),
        *[Step("sort: clear", 0.0), Step("sort: pass", one)] * passes,
    ]


# ---------------------------------------------------------------------------------------------
# The kernels of 2026-11-26 (commit 638fdfc), whose times were measured

MASK_TEST, STRIKE_TEST, SEGMENT_TEST, SEGMENT_PAIR = 42, 40, 45, 100
"""Warp instructions, between the shortest and the longest way that sass.py finds (34-55, 5-54, 37-60, 37-133)."""
RESOLVE_TILE, SETTLE_TURN, PUSH_ROW = 150, 40, 12


def in_order(machine: Machine, count: int, emitted: int = 0) -> float:
    """`each_in_order`: a block takes 8,192 numbers at a time; a thread writes its own one after the other."""
    turns = math.ceil(count / 8192)
    most = min(8, math.ceil(16 * emitted / max(count, 1)))  # of one thread of a warp
    one = machine.l2_latency + machine.chain(8 * 12 + 80) + 2 * machine.barrier
    return turns * (one + most * (machine.l2_latency + machine.chain(15)))


def mask(machine: Machine, listed: int, images: int = 1) -> float:
    tiles = math.ceil(listed / TILE)
    pairs = images * tiles * (tiles + 1) // 2
    pair = TILE * MASK_TEST + 80
    blocks = min(images * tiles * tiles, 2048)
    return 2 * machine.l2_latency + max(
        machine.chain(pair) * math.ceil(pairs / blocks), machine.issued(2 * pairs * pair)
    )


def most_of(tries: int, share: float, among: int) -> int:
    """What the luckiest of so many warps has: each of its tries succeeds with this chance."""
    below = 0.0
    for number in range(tries + 1):
        below += math.comb(tries, number) * share**number * (1 - share) ** (tries - number)
        if below > 1 - 1 / among:
            return number
    return tries


def resolve(machine: Machine, found: Round) -> float:
    total, tiles = 0.0, len(found.tiles)
    for number, tile in enumerate(found.tiles):
        stripes = max(1, math.ceil((tiles - number - 2) / 32))
        rows = most_of(math.ceil(TILE / (31 // stripes)), found.kept / found.listed, among=31)
        push = machine.chain(60) + rows * (machine.l2_latency + machine.chain(PUSH_ROW)) + machine.l2_latency
        total += max(machine.chain(RESOLVE_TILE + SETTLE_TURN * tile.turns), push) + machine.barrier
    return total + in_order(machine, found.listed, found.kept) + 2 * machine.l2_latency


def strike(machine: Machine, found: Round) -> float:
    tests = found.kept * found.rest / 32 * STRIKE_TEST
    return 3 * machine.l2_latency + max(machine.chain(min(found.kept, 256) * STRIKE_TEST), machine.issued(tests))


def segment(machine: Machine, tiles: tuple[Tile, ...]) -> float:
    """A block of 32 warps decides on a group. Its tests are issued by all warps that have boxes left."""
    total = 3 * machine.l2_latency
    for tile in tiles:
        tests = tile.kept * math.ceil(tile.alive / 32) * SEGMENT_TEST
        own = machine.chain(2 * SEGMENT_PAIR + 40 + SETTLE_TURN * tile.turns) + 4 * machine.barrier
        total += own + max(machine.chain(tile.kept * SEGMENT_TEST), machine.cycles(tests / machine.issue))
    return total


def before(
    machine: Machine, count: int, found: tuple[Round, ...], chunk: int, segments: float, grouped: bool
) -> list[Step]:
    """The launches of csrc/nms/cuda/steps.h for one image. segments: the time of its small groups."""
    m, capacity = machine, 1 << (2 * count - 1).bit_length()
    launches = math.ceil(count / chunk)
    steps = [Step("keys", m.dram_latency + m.chain(60)), *sort(m, count, 32)]
    if grouped:
        number = 4 * m.l2_latency + m.dram_latency + m.chain(120)
        steps += [Step("clear", 0.0), Step("number groups", number), *sort(m, count, capacity.bit_length())]
    steps.append(Step("gather", m.l2_latency + m.dram_latency + m.chain(80)))
    if grouped:
        steps += [Step("clear", 0.0), Step("find segments", 3 * m.l2_latency + m.chain(60)), Step("segments", segments)]
    steps.append(Step("clear", 0.0))
    at = 0
    for number in range(launches):
        one = found[number] if number < len(found) else Round(0, 0, (), 0)
        looked_at = count if not found and number == 0 else one.listed * 2 if number else one.listed
        steps += [
            Step("list", in_order(m, looked_at, one.listed) + m.l2_latency),
            Step("mask", mask(m, one.listed) if one.listed else m.l2_latency),
            Step("resolve", resolve(m, one) if one.listed else m.l2_latency),
        ]
        at += one.listed
        if number + 1 < launches:
            steps.append(Step("strike", strike(m, one) if one.kept else m.l2_latency))
    kept = sum(one.kept for one in found) or count // 2
    return [*steps, Step("result", in_order(m, count, kept))]


def chunk_of(count: int) -> int:
    return min(max(min(max(count // 8, 4096), 16384) // TILE, 1) * TILE, count)


def plain_before(machine: Machine, count: int, threshold: float, grouped: bool = True) -> list[Step]:
    """The benchmark's time on the device is that of `nms_padded` with one group; `nms` has none."""
    chunk = chunk_of(count)
    return before(machine, count, rounds(count, threshold, chunk), chunk, machine.l2_latency, grouped)


def classes_before(machine: Machine, classes: int = 80, each: int = 1000, threshold: float = 0.5) -> list[Step]:
    slowest = max(segment(machine, class_tiles(label, each, threshold)) for label in range(0, classes, 10))
    return before(machine, classes * each, (), chunk_of(classes * each), slowest, True)
