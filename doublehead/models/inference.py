"""The heads at inference: each runs on the RoIs that it can still matter for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from .heads import HeadOutput, Heads
from .readout import ReadOut
from .roi_pooling import RoIPooling
from .rounds import Decoding, run_in_rounds, stops_early
from .selection import Selection, bring_to_front, may_be_detected, restore, select_boxes, with_images
from .structures import Proposals


class HeadsResult(NamedTuple):
    """What the heads say of every RoI."""

    outputs: dict[str, HeadOutput]
    """Branch name -> output for the B * R RoIs; of a branch that was not run on a RoI, its row means nothing."""
    proposals: Proposals
    """`[B, R]`; RoIs that cannot be detected, or that an approximate gate drops, may be marked as not valid."""
    box_rois: Tensor
    """`Tensor[B]` int64: how many RoIs of each image the head that gives the boxes ran on."""


def run_heads(
    heads: Heads,
    pooling: RoIPooling,
    features: Sequence[Tensor],
    proposals: Proposals,
    readout: ReadOut,
    decoding: Decoding | None = None,
) -> HeadsResult:
    """Run the branches a read-out needs; the last of them, where it may be, on a selection of the RoIs.

    Where one head gives the classes and another the boxes, only RoIs with a class above the score threshold need boxes,
    and of these, on a CPU, only those that can enter the best `max_detections` (see `rounds`): exact.  With Ext's fused
    read-out the conv-head classifies too, and only `config.ext_gate` gives it fewer RoIs: approximate, off by default.

    Args:
        heads, pooling: the detector's.
        features: pyramid levels, `Tensor[B, C, H, W]` each.
        proposals: `[B, R]`.
        readout: the branches needed, and its thresholds.
        decoding: what detections need; None: every RoI above the threshold gets a box.
    """
    (result,) = run_heads_for_each(heads, pooling, features, proposals, [readout], decoding)
    return result


def run_heads_for_each(
    heads: Heads,
    pooling: RoIPooling,
    features: Sequence[Tensor],
    proposals: Proposals,
    readouts: Sequence[ReadOut],
    decoding: Decoding | None = None,
) -> list[HeadsResult]:
    """`run_heads` for several read-outs of the same heads, each equal to the bit to one that runs by itself.

    A branch runs once on all RoIs for all read-outs that need it there.  Those that run it on a selection of the RoIs
    do so here too, although a run on all may be at hand: on another number of RoIs matrix products round differently.
    """
    selecting = [_selects(heads, features, readout) for readout in readouts]
    on_all: list[str] = []
    for readout, selects in zip(readouts, selecting, strict=True):
        sources = readout.sources
        on_all += sources.classes[:1] if selects else (*sources.classes, sources.boxes)
    scales = sorted({heads.box_scales[name] for name in on_all})
    outputs = heads(pooling(features, proposals.boxes, scales), set(on_all))
    done: dict[tuple, tuple[dict[str, HeadOutput], Tensor]] = {}
    results = []
    for readout, selects in zip(readouts, selecting, strict=True):
        sources, least = readout.sources, readout.least_score
        own, ran, kept = outputs, proposals.valid, proposals
        logits = outputs[sources.classes[0]].logits
        if selects:
            passes = proposals.valid & may_be_detected(logits, least).view_as(proposals.valid)
            early = decoding is not None and stops_early(readout, passes)
            key = (sources.classes[0], sources.boxes, least, readout.detection if early else None)
            if key not in done:
                if early:
                    run = _runner_on_numbers(heads, pooling, features, proposals, sources.boxes)
                    classes = outputs[sources.classes[0]]
                    boxes, ran = run_in_rounds(run, classes, proposals, passes, readout, decoding)
                    done[key] = {sources.boxes: boxes}, ran
                else:
                    done[key] = _run_selected(heads, pooling, features, proposals, sources.boxes, passes), passes
            selected, ran = done[key]
            own = outputs | selected
            if early:
                kept = Proposals(proposals.boxes, ran)
        if readout.gated:
            passes = proposals.valid & may_be_detected(logits, least).view_as(proposals.valid)
            kept = Proposals(proposals.boxes, passes)
        results.append(HeadsResult(own, kept, ran.sum(1)))
    return results


def judge_gates(ran: HeadsResult, proposals: Proposals, readouts: Sequence[ReadOut]) -> list[HeadsResult]:
    """What several gates of Ext's fused read-out leave, judged from one run of the heads on all RoIs.

    Each gate keeps the RoIs that it keeps in `run_heads`.  Only the conv-head's numbers differ, in their last digits:
    there it runs on the kept RoIs alone, and on another number of RoIs matrix products round differently.

    Args:
        ran: of `run_heads` without a gate, for the same heads.
        proposals: `[B, R]`.
        readouts: with the gates.
    """
    results = []
    for readout in readouts:
        kept = proposals.valid
        if readout.gated:
            logits = ran.outputs[readout.sources.classes[0]].logits
            kept = kept & may_be_detected(logits, readout.least_score).view_as(kept)
        results.append(HeadsResult(ran.outputs, Proposals(proposals.boxes, kept), kept.sum(1)))
    return results


def _selects(heads: Heads, features: Sequence[Tensor], readout: ReadOut) -> bool:
    """Whether the head that gives the boxes runs on a selection of the RoIs."""
    return readout.skips and heads[readout.sources.boxes].tower.can_skip(features[0])


def _run_selected(
    heads: Heads, pooling: RoIPooling, features: Sequence[Tensor], proposals: Proposals, name: str, passes: Tensor
) -> dict[str, HeadOutput]:
    """The branch `name` on the RoIs that `passes` (bool `Tensor[B, R]`) marks; rows in the RoIs' places."""
    selection = bring_to_front(passes.flatten())
    rois = select_boxes(proposals.boxes, selection)
    selected = heads(pooling(features, rois, [heads.box_scales[name]]), {name}, selection.count)
    return {name: _restore(output, selection) for name, output in selected.items()}


def _runner_on_numbers(
    heads: Heads, pooling: RoIPooling, features: Sequence[Tensor], proposals: Proposals, name: str
) -> Callable[[Tensor], HeadOutput]:
    """Runs the branch `name` on the RoIs of these numbers among B * R, and no more rows than these."""
    rois = with_images(proposals.boxes)

    def run(numbers: Tensor) -> HeadOutput:
        return heads(pooling(features, rois[numbers], [heads.box_scales[name]]), {name})[name]

    return run


def _restore(output: HeadOutput, selection: Selection) -> HeadOutput:
    return HeadOutput(*(None if values is None else restore(values, selection) for values in output))
