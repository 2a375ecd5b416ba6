"""From the heads' outputs to detections: read-out, score fusion (Equation 4), per-class NMS."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..config import DetectionConfig, Fusion, HeadKind, LossConfig, ReadOut
from ..ops import nms_padded
from ..ops.boxes import clip_boxes, decode_boxes
from .heads import BRANCHES, HeadOutput
from .losses import task_weights
from .structures import Detections, Proposals, gather_rows


class Sources(NamedTuple):
    """Which branches a read-out takes its classes and its boxes from."""

    classes: tuple[str, ...]
    boxes: str


EXT_SOURCES: dict[ReadOut, Sources] = {
    "fused": Sources(("fc", "conv"), "conv"),
    "split": Sources(("fc",), "conv"),
    "fc": Sources(("fc",), "fc"),
    "conv": Sources(("conv",), "conv"),
}
"""The four ways to read out one Ext model (PAPER Figure 6)."""


def resolve_sources(kind: HeadKind, readout: ReadOut, fusion: Fusion, loss: LossConfig) -> Sources:
    """Find the branches a read-out needs, and make sure that they were trained.

    Kinds other than Ext have one classifier and one regressor; their only read-out is `fused`.

    Raises:
        ValueError: the kind does not have this read-out, or its loss weights leave one of the
            needed tasks untrained (Equation 4 holds only for l_fc != 0 and l_conv != 1).
    """
    branches = BRANCHES[kind]
    if kind != "double_head_ext":
        if readout != "fused":
            raise ValueError(f"detection.readout: {readout!r} needs head.kind 'double_head_ext', got {kind!r}")
        classes = next(name for name, branch in branches.items() if branch.classifies)
        boxes = next(name for name, branch in branches.items() if branch.regresses)
        return Sources((classes,), boxes)
    if readout not in EXT_SOURCES:
        raise ValueError(f"detection.readout: expected one of {', '.join(EXT_SOURCES)}, got {readout!r}")
    if fusion not in FUSIONS and fusion != "none":
        raise ValueError(f"detection.fusion: expected one of {', '.join(FUSIONS)}, none, got {fusion!r}")
    sources = EXT_SOURCES["split" if readout == "fused" and fusion == "none" else readout]
    weights = task_weights(kind, loss)
    untrained = [f"{name}-head's classifier" for name in sources.classes if weights[name][0] == 0]
    if weights[sources.boxes][1] == 0:
        untrained.append(f"{sources.boxes}-head's box regressor")
    if untrained:
        raise ValueError(
            f"detection.readout {readout!r} with fusion {fusion!r} needs the {' and the '.join(untrained)}, which the "
            f"loss weights leave untrained (l_fc = {loss.l_fc}, l_conv = {loss.l_conv}); choose another read-out"
        )
    return sources


FUSIONS = {
    "complementary": lambda fc, conv: fc + conv * (1 - fc),
    "max": torch.maximum,
    "average": lambda fc, conv: (fc + conv) / 2,
}
"""How two classifiers' probabilities become one score (PAPER Table 3); "none" takes the fc-head's."""


def detect(
    outputs: dict[str, HeadOutput],
    sources: Sources,
    proposals: Proposals,
    sizes: Tensor,
    config: DetectionConfig,
    box_weights: tuple[float, float, float, float],
) -> Detections:
    """Decode, clip, threshold and suppress: the best `max_detections` boxes of each image.

    Args:
        outputs: branch name -> output for the B * R proposals.
        sources: which branches to use.
        proposals: `[B, R]`.
        sizes: `Tensor[B, 2]`, (height, width) of each image.
        config: thresholds and limits.
        box_weights: of the box coder.

    Returns:
        Detections with `max_detections` slots, best score first.
    """
    scores = class_scores([outputs[name].logits for name in sources.classes], config.fusion)
    batch, slots = proposals.valid.shape
    scores = scores.unflatten(0, (batch, slots))[..., 1:]  # [B, R, foreground classes]
    deltas = outputs[sources.boxes].deltas.unflatten(0, (batch, slots))[:, :, 1:]
    boxes = decode_boxes(deltas, proposals.boxes[:, :, None], box_weights).flatten(1, 2)
    boxes = clip_boxes(boxes, sizes)

    labels = torch.arange(1, scores.shape[2] + 1, device=scores.device).expand_as(scores)
    wide = ((boxes[..., 2:] - boxes[..., :2]) >= config.min_size).all(-1).view_as(scores)
    candidate = (scores > config.score_threshold) & proposals.valid[..., None] & wide
    groups = torch.where(candidate, labels, -1).flatten(1)
    scores = scores.flatten(1)
    kept, count = nms_padded(boxes, scores, groups, config.nms_iou, config.max_detections)

    filled = torch.arange(config.max_detections, device=kept.device) < count[:, None]
    kept = kept.clamp(min=0)
    return Detections(
        boxes=torch.where(filled[..., None], gather_rows(boxes, kept), 0.0),
        scores=torch.where(filled, scores.gather(1, kept), 0.0),
        labels=torch.where(filled, groups.gather(1, kept), 0),
        count=count,
    )


def class_scores(logits: list[Tensor], fusion: Fusion) -> Tensor:
    """Class probabilities of one classifier, or of two fused.

    Args:
        logits: one or two `Tensor[N, classes]`, the fc-head's first.
        fusion: how to join two.

    Returns:
        `Tensor[N, classes]`.  A fused row need not sum to one (Equation 4 is no distribution).
    """
    probabilities = [torch.softmax(item, dim=-1) for item in logits]
    return probabilities[0] if len(probabilities) == 1 else FUSIONS[fusion](*probabilities)
