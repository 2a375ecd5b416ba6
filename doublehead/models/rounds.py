"""Boxes for the RoIs that can enter the best `max_detections`, and no others; where the host may look at results.

The head that gives the classes scores every RoI first.  The head that gives the boxes then sees the RoIs in rounds,
best first.  Once an image has `max_detections` detections that all score above every class of the RoIs left, these can
neither enter nor suppress one of them (NMS goes from the best score down): they need no boxes.  Exact; it saves work on
crowded images only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops._library import in_dispatch_mode
from .detections import detect
from .heads import HeadOutput
from .readout import ReadOut
from .selection import SLACK
from .structures import Proposals

FIRST = 128
"""RoIs of an image in the first round: `max_detections` is 100 as a rule, and most need several RoIs."""
NEXT = 64
"""RoIs in every further round: two chunks of the conv-head, whose time hides that of looking (about a millisecond)."""


class Decoding(NamedTuple):
    """What `detect` needs beside the heads' outputs and the read-out."""

    sizes: Tensor
    """`Tensor[B, 2]`, (height, width) of each image."""
    box_weights: tuple[float, float, float, float]
    min_side: float = 0.0


def stops_early(readout: ReadOut, passes: Tensor) -> bool:
    """Whether rounds may save work: one head gives the scores, and some image has more RoIs than the first round.

    Not on a GPU, where looking at results costs more than it saves, nor in programs that are traced.

    Args:
        passes: bool `Tensor[B, R]`: the RoIs that may be detected.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or in_dispatch_mode():  # there may be no values to read
        return False
    if readout.gated or readout.detection.max_detections < 1:
        return False
    return passes.device.type == "cpu" and passes.shape[1] > FIRST and int(passes.sum(1).amax()) > FIRST


def run_in_rounds(
    run: Callable[[Tensor], HeadOutput],
    classes: HeadOutput,
    proposals: Proposals,
    passes: Tensor,
    readout: ReadOut,
    decoding: Decoding,
) -> tuple[HeadOutput, Tensor]:
    """Run the head that gives the boxes until the best detections are known.

    Args:
        run: that head, on the RoIs of these numbers, `Tensor[n]` int64 among B * R; a row each.
        classes: what the other head says of all B * R RoIs.
        proposals: `[B, R]`.
        passes: bool `Tensor[B, R]`: the RoIs that may be detected.

    Returns:
        What `run` says, in the RoIs' places, zero for the others; and on which RoIs it ran, bool `Tensor[B, R]`.
    """
    number = readout.detection.max_detections
    best = torch.softmax(classes.logits, dim=-1)[:, 1:].amax(-1).view_as(passes).masked_fill(~passes, 0.0)
    rank = best.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    end, ran = FIRST, passes & (rank < FIRST)
    output = _put(None, run(_numbers(ran)), _numbers(ran), ran.numel())
    while True:
        rest = passes & ~ran
        outputs = {readout.sources.classes[0]: classes, readout.sources.boxes: output}
        found = detect(outputs, readout, Proposals(proposals.boxes, ran), *decoding)
        # A kernel may round scores in another way: a RoI that nearly reaches the last detection is not left out.
        reach = best.masked_fill(~rest, 0.0).amax(1) * (1 + SLACK)
        known = (found.count == number) & (found.scores[:, -1] > reach)
        more = rest & ~known[:, None] & (rank < end + NEXT)
        if not more.any():
            return output, ran
        output = _put(output, run(_numbers(more)), _numbers(more), more.numel())
        end, ran = end + NEXT, ran | more


def _numbers(marked: Tensor) -> Tensor:
    return marked.flatten().nonzero().squeeze(1)


def _put(output: HeadOutput | None, rows: HeadOutput, numbers: Tensor, total: int) -> HeadOutput:
    """Write `rows` into their places of `output`; None: zeros, for `total` RoIs."""
    places = [None] * len(rows) if output is None else output
    filled = []
    for place, new in zip(places, rows, strict=True):
        if new is not None:
            place = new.new_zeros((total, *new.shape[1:])) if place is None else place
            place.index_copy_(0, numbers, new)
        filled.append(place)
    return HeadOutput(*filled)
