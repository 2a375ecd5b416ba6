"""Non-maximum suppression in the cost model, as it is now: one kernel orders few boxes, one decides on any."""

from __future__ import annotations

import functools
import math

import model_nms as nms
import torch
from model_machine import Machine, Step

SPAN, ROWS, THREADS = 2048, 32, 512
COMPARE, COMPARE_GROUPS = 3, 9
"""Warp instructions for each box that a lane's box is compared with, without groups and with."""
TESTS_OF_32, PAIR, TURN = 586, 80, 150
"""Warp instructions: 32 tests of each lane's box (537 to 586); a pair of half tiles beside them; a turn of a tile."""
MEET = 1.3
"""All blocks wait for each other: an atomic in the L2, and a look at it until all have come. Published of cooperative
groups' barrier on such GPUs: 1.2 to 1.5 us."""
WARPS = 32  # of a block that decides; one block a multiprocessor


@functools.cache
def depth(count: int, threshold: float) -> int:
    """In how many turns all boxes are decided if every turn keeps all that nothing undecided could suppress."""
    boxes = nms.ordered(count)
    suppressed_by = torch.cat([nms.above(some, boxes, threshold) for some in boxes.split(256)]).tril(-1)
    undecided, kept, turns = torch.ones(count, dtype=torch.bool), torch.zeros(count, dtype=torch.bool), 0
    while undecided.any():
        clear = undecided & ~suppressed_by[:, undecided].any(1)
        kept |= clear
        undecided &= ~clear & ~suppressed_by[:, kept].any(1)
        turns += 1
    return turns


def rank(machine: Machine, count: int, grouped: bool) -> Step:
    """All are compared with all: a block ranks 32 boxes, its 16 warps share the others."""
    m, blocks = machine, math.ceil(count / ROWS)
    spans, own = math.ceil(count / SPAN), min(SPAN, count) / (THREADS / 32) * (COMPARE_GROUPS if grouped else COMPARE)
    chain = (
        m.dram_latency + spans * (m.dram_latency + m.chain(own + 40) + 2 * m.barrier) + m.chain(200) + m.dram_latency
    )
    waves = math.ceil(blocks / (m.multiprocessors * 3))
    return Step("rank", max(chain * waves, m.issued(blocks * (THREADS / 32) * spans * (own + 40))))


def mask(machine: Machine, listed: int) -> float:
    halves = 2 * math.ceil(listed / nms.TILE)
    pairs = halves * (halves + 1) // 2
    each = math.ceil(pairs / (machine.multiprocessors * WARPS))
    own = 2 * machine.l2_latency + machine.chain(TESTS_OF_32 + PAIR)
    return max(each * own, machine.issued(pairs * (TESTS_OF_32 + PAIR)))


def settle(machine: Machine, listed: int, turns: int) -> float:
    tiles = math.ceil(listed / nms.TILE)
    waves = math.ceil(tiles / machine.multiprocessors)
    one = machine.l2_latency + machine.chain(TURN) + 2 * machine.barrier
    return waves * (3 * machine.l2_latency + machine.chain(150)) + (turns + 2) * one


def passing(machine: Machine) -> float:
    """All blocks count what passes a test, and write it in order."""
    return (
        2 * (machine.l2_latency + machine.chain(150) + 2 * machine.barrier)
        + MEET
        + 2 * machine.l2_latency
        + machine.chain(120)
    )


def strike(machine: Machine, found: nms.Round) -> float:
    chain = 3 * machine.l2_latency + math.ceil(min(found.kept, 256) / 32) * machine.chain(TESTS_OF_32 + 20)
    return max(chain, machine.issued(found.kept / 32 * found.rest / 32 * (TESTS_OF_32 + 20)))


def decide(machine: Machine, found: tuple[nms.Round, ...], turns: int, listed: bool) -> Step:
    total = 0.0
    for number, one in enumerate(found):
        total += 0 if listed and number == 0 else passing(machine) + MEET
        total += mask(machine, one.listed) + MEET + settle(machine, one.listed, turns) + MEET
        total += strike(machine, one) + MEET if one.rest else 0
    if not listed:
        total += passing(machine) + MEET  # a list in which nothing is left
    return Step("decide", total + passing(machine))


def plain(machine: Machine, count: int, threshold: float, grouped: bool = True) -> list[Step]:
    """`nms_padded` with one group, or `nms`."""
    chunk = nms.chunk_of(count)
    if count <= 8192 and count * count <= 1 << 26:
        found = nms.rounds(count, threshold, count)
        return [rank(machine, count, grouped), decide(machine, found, depth(count, threshold), True)]
    return [*ordered(machine, count, grouped), decide(machine, nms.rounds(count, threshold, chunk), 4, False)]


def ordered(machine: Machine, count: int, grouped: bool) -> list[Step]:
    """Many boxes are sorted by CUB. Groups are numbered and counted; their boxes find places as all are gathered."""
    m = machine
    keys = [Step("keys", m.dram_latency + m.chain(60)), *nms.sort(m, count, 32)]
    number = [Step("number groups", 5 * m.l2_latency + m.dram_latency + m.chain(140))] if grouped else []
    return [*keys, *number, Step("gather", 3 * m.l2_latency + m.dram_latency + m.chain(100))]


SEGMENT_TESTS, SEGMENT_PAIR, SORT_STEP = 310, 70, 20
"""Warp instructions of 16 tests (269 to 314) of a box with those kept, of a pair inside a tile, of a step of a sort."""


def segment(machine: Machine, tiles: tuple[nms.Tile, ...]) -> float:
    """A block sorts the members of a group by rank and decides on them, as part of `decide`."""
    m, levels = machine, math.ceil(math.log2(max(2, nms.TILE * len(tiles))))
    total = 3 * m.l2_latency + levels * (levels + 1) / 2 * (m.chain(SORT_STEP) + m.barrier)
    for tile in tiles:
        sixteens = math.ceil(tile.kept / 16)
        tests = sixteens * math.ceil(tile.alive / 32) * SEGMENT_TESTS
        own = m.chain(2 * SEGMENT_PAIR + 60 + nms.SETTLE_TURN * tile.turns) + 4 * m.barrier
        total += own + max(m.chain(sixteens * SEGMENT_TESTS), m.cycles(tests / m.issue))
    return total


def classes(machine: Machine, number: int = 80, each: int = 1000, threshold: float = 0.5) -> list[Step]:
    slowest = max(segment(machine, nms.class_tiles(label, each, threshold)) for label in range(0, number, 10))
    found = decide(machine, (), 0, False)
    return [*ordered(machine, number * each, True), found._replace(work=found.work + slowest + MEET)]
