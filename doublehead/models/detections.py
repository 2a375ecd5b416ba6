"""From the heads' outputs to detections: which heads are read out, and the call of the operator."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..config import DetectionConfig, Fusion, HeadKind, LossConfig, ReadOut
from ..ops import detections
from ..ops.score_fusion import FUSIONS
from .heads import BRANCHES, HeadOutput
from .losses import task_weights
from .structures import Detections, Proposals


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
    if fusion not in FUSIONS:
        raise ValueError(f"detection.fusion: expected one of {', '.join(FUSIONS)}, got {fusion!r}")
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


def detect(
    outputs: dict[str, HeadOutput],
    sources: Sources,
    proposals: Proposals,
    sizes: Tensor,
    config: DetectionConfig,
    box_weights: tuple[float, float, float, float],
    least_side: float = 0.0,
) -> Detections:
    """Decode, clip, threshold and suppress: the best `max_detections` boxes of each image.

    Args:
        outputs: branch name -> output for the B * R proposals.
        sources: which branches to use.
        proposals: `[B, R]`.
        sizes: `Tensor[B, 2]`, (height, width) of each image.
        config: thresholds and limits.
        box_weights: of the box coder.
        least_side: pixels that clipping to the image leaves of a box outside of it.

    Returns:
        Detections with `max_detections` slots, best score first.
    """
    slots = proposals.valid.shape  # of the batch: [B, R]
    return Detections(
        *detections(
            [outputs[name].logits.unflatten(0, slots) for name in sources.classes],
            outputs[sources.boxes].deltas.unflatten(0, slots),
            proposals.boxes,
            proposals.valid,
            sizes,
            fusion=config.fusion,
            score_threshold=config.score_threshold,
            nms_iou=config.nms_iou,
            max_detections=config.max_detections,
            min_size=config.min_size,
            least_side=least_side,
            box_weights=box_weights,
        )
    )
