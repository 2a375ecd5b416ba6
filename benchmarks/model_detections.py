"""From logits to detections in the cost model: the candidates of the benchmark's own logits, class by class."""

from __future__ import annotations

import functools
import math

import model_nms as nms
from model_machine import Machine, Step
from post_processing import OPTIONS, head_outputs

from doublehead.ops.boxes import decode_boxes
from doublehead.ops.score_fusion.reference import fuse_scores

ROIS, CLASSES, MOST = 1000, 81, OPTIONS["max_detections"]


@functools.cache
def classes() -> tuple[tuple[int, tuple[nms.Tile, ...]], ...]:
    """Of each foreground class: how many candidates it has, and how their tiles are settled."""
    (fc, conv), deltas, proposals, _, _ = (
        [part.cpu() for part in item] if isinstance(item, list) else item.cpu()
        for item in head_outputs(1, ROIS, CLASSES)
    )
    scores = fuse_scores(fc[0], conv[0], OPTIONS["fusion"])
    found = []
    for label in range(1, CLASSES):
        chosen = (scores[:, label] > OPTIONS["score_threshold"]).nonzero()[:, 0]
        chosen = chosen[scores[chosen, label].argsort(descending=True)]
        boxes = decode_boxes(deltas[0, chosen, label], proposals[0, chosen], OPTIONS["box_weights"])
        found.append((len(chosen), nms.decide(boxes, OPTIONS["nms_iou"])[1]))
    return tuple(found)


def before(machine: Machine) -> list[Step]:
    """Commit 638fdfc: 40 slots a RoI, few of them candidates, through `nms_padded`; groups are known to be small."""
    m, slots = machine, 40 * ROIS
    slowest = max(nms.segment(m, tiles) for _, tiles in classes())
    suppression = nms.before(m, slots, (), slots, slowest, True)
    without_rounds = [step for step in suppression if step.name not in ("list", "mask", "resolve", "strike", "result")]
    scores = Step("scores", 2 * m.dram_latency + 3 * m.chain(400))  # 8 programs a multiprocessor, some waves
    ends = [Step("result", nms.in_order(m, 8192, MOST)), Step("gather", 2 * m.dram_latency + m.chain(100))]
    return [scores, *without_rounds, *ends]


# ---------------------------------------------------------------------------------------------
# csrc/detections: three launches

SCORES, BOX, SORT_STEP, EIGHT_TESTS = 540, 240, 25, 205
"""Warp instructions between marks: all scores of a RoI; a box; a step of the sort with its loop; 8 tests."""


def sort(machine: Machine, count: int, threads: int) -> float:
    """A bitonic network of the next power of two."""
    levels = max(1, math.ceil(math.log2(max(count, 2))))
    steps, rounds = levels * (levels + 1) // 2, max(1, 2**levels // 2 // threads)
    with_barrier = max(0, levels - 6) * (levels - 5) // 2 * 2  # partners that are more than 32 apart, and those after
    return steps * rounds * machine.chain(SORT_STEP) + with_barrier * machine.barrier


def suppress_class(machine: Machine, candidates: int, tiles: tuple[nms.Tile, ...]) -> float:
    m, total, kept = machine, 0.0, 0
    total += m.l2_latency + 4 * m.chain(45) + 4 * m.barrier
    if not candidates:
        return total
    total += math.ceil(candidates / 256) * (2 * m.dram_latency + m.chain(BOX))
    total += sort(m, candidates, 256) + m.chain(60) + 2 * m.barrier
    for tile in tiles:
        tests = math.ceil(kept / 32) + 2
        total += tests * m.chain(EIGHT_TESTS) + m.chain(60 + nms.SETTLE_TURN * tile.turns) + 2 * m.barrier
        kept += tile.kept
    return total


def merge(machine: Machine, kept: list[int]) -> float:
    m, foreground = machine, len(kept)
    step = max(4, 1024 // foreground)
    first = sum(min(number, step) for number in kept)
    sweeps = min(
        3, math.ceil(max(kept) / step)
    )  # behind the first few hardly a key is better than the worst of the best
    total = 2 * m.l2_latency + 4 * m.barrier + sweeps * (m.l2_latency + m.chain(80) + 3 * m.barrier)
    total += sort(m, first, 1024) + (sort(m, 2 * MOST, 1024) if sweeps > 1 else 0)
    return total + m.l2_latency + 2 * m.dram_latency + m.chain(BOX + 40)


def after(machine: Machine) -> list[Step]:
    m = machine
    size = 4
    traffic = 2 * ROIS * CLASSES * size / m.dram
    scores = 2 * m.dram_latency + m.chain(SCORES) + m.barrier + 3 * m.chain(20) + traffic
    slowest = max(suppress_class(m, count, tiles) for count, tiles in classes())
    kept = [sum(tile.kept for tile in tiles) for _, tiles in classes()]
    return [Step("scores", scores), Step("classes", slowest), Step("merge", merge(m, kept))]
