"""The heads at inference: each runs on the RoIs that it can still matter for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..config import DetectionConfig
from .conv_tower import ConvTower
from .detections import Sources
from .heads import HeadOutput, Heads
from .roi_pooling import RoIPooling
from .selection import Selection, bring_to_front, may_be_detected, restore, select_boxes
from .structures import Proposals


class HeadsResult(NamedTuple):
    """What the heads say of every RoI."""

    outputs: dict[str, HeadOutput]
    """Branch name -> output for the B * R RoIs; of a branch that was not run on a RoI, its row means nothing."""
    proposals: Proposals
    """`[B, R]`; an approximate gate marks what it drops as not valid."""
    box_rois: Tensor
    """`Tensor[B]` int64: how many RoIs of each image the head that gives the boxes ran on."""


def run_heads(
    heads: Heads,
    pooling: RoIPooling,
    features: Sequence[Tensor],
    proposals: Proposals,
    sources: Sources,
    config: DetectionConfig,
) -> HeadsResult:
    """Run the branches a read-out needs; the last of them, where it may be, on a selection of the RoIs.

    Where one head gives the classes and another the boxes, only RoIs with a class above the score threshold need boxes:
    exact.  With Ext's fused read-out the conv-head has a say in the classes too, and only `config.ext_gate` lets it
    see fewer RoIs: approximate, off by default.

    Args:
        heads, pooling: the detector's.
        features: pyramid levels, `Tensor[B, C, H, W]` each.
        proposals: `[B, R]`.
        sources: the branches needed.
        config: thresholds.
    """
    gated = config.ext_gate > 0 and len(sources.classes) == 2
    skips = config.skip and sources.boxes not in sources.classes
    tower = heads[sources.boxes].tower
    if not (gated or skips) or not (isinstance(tower, ConvTower) and tower.folds(features[0])):
        outputs = heads(pooling(features, proposals.boxes), {*sources.classes, sources.boxes})
        ran = proposals.valid.sum(1)
        if gated:
            proposals = _gate(proposals, outputs[sources.classes[0]].logits, config.ext_gate)
        return HeadsResult(outputs, proposals, ran)

    first = sources.classes[0]
    outputs = heads(pooling(features, proposals.boxes, [heads.box_scales[first]]), {first})
    threshold = config.ext_gate if gated else config.score_threshold
    passes = may_be_detected(outputs[first].logits, threshold) & proposals.valid.flatten()
    selection = bring_to_front(passes)
    rois = select_boxes(proposals.boxes, selection)
    selected = heads(pooling(features, rois, [heads.box_scales[sources.boxes]]), {sources.boxes}, selection.count)
    outputs |= {name: _restore(output, selection) for name, output in selected.items()}
    passes = passes.view_as(proposals.valid)
    return HeadsResult(outputs, Proposals(proposals.boxes, passes) if gated else proposals, passes.sum(1))


def _gate(proposals: Proposals, logits: Tensor, threshold: float) -> Proposals:
    passes = may_be_detected(logits, threshold).view_as(proposals.valid)
    return Proposals(proposals.boxes, proposals.valid & passes)


def _restore(output: HeadOutput, selection: Selection) -> HeadOutput:
    return HeadOutput(*(None if values is None else restore(values, selection) for values in output))
