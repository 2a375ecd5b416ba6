"""From the heads' outputs to detections: the call of the operator."""

from __future__ import annotations

from torch import Tensor

from ..ops import detections
from .heads import HeadOutput
from .readout import ReadOut, Sources  # noqa: F401  models that version 0.1.0 pickled whole name it so
from .structures import Detections, Proposals


def detect(
    outputs: dict[str, HeadOutput],
    readout: ReadOut,
    proposals: Proposals,
    sizes: Tensor,
    box_weights: tuple[float, float, float, float],
    min_side: float = 0.0,
) -> Detections:
    """Decode, clip, threshold and suppress: the best `max_detections` boxes of each image.

    Args:
        outputs: branch name -> output for the B * R proposals.
        readout: which branches to use, and how.
        proposals: `[B, R]`.
        sizes: `Tensor[B, 2]`, (height, width) of each image.
        box_weights: of the box coder.
        min_side: how wide and high, in pixels, a box outside of the image is after clipping.

    Returns:
        Detections with `max_detections` slots, best score first.
    """
    config = readout.detection
    slots = proposals.valid.shape  # of the batch: [B, R]
    return Detections(
        *detections(
            [outputs[name].logits.unflatten(0, slots) for name in readout.sources.classes],
            outputs[readout.sources.boxes].deltas.unflatten(0, slots),
            proposals.boxes,
            proposals.valid,
            sizes,
            fusion=config.fusion,
            score_threshold=config.score_threshold,
            nms_iou=config.nms_iou,
            max_detections=config.max_detections,
            min_size=config.min_size,
            least_side=min_side,
            box_weights=box_weights,
        )
    )
