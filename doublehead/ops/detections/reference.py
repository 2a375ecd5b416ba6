"""Detections in plain PyTorch: the definition, for any device.

A candidate is a foreground class of a valid RoI.  It takes part if

    score > score_threshold     the score of `score_fusion`; a NaN exceeds nothing
    its box is finite           as decoded, before it is clipped to the image
    width, height >= min_size   as clipped

so a NaN or an infinity removes the candidates that depend on it and no other: a bad logit all classes of its RoI (the
softmax spreads it), a bad delta its class, a bad proposal its RoI.  Infinite logarithms of sides are no exception to
the bound that `boxes.decode_boxes` sets.  Candidates are ordered by score, equal scores by RoI and then by class.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._dtypes import score_dtype
from ..boxes import clip_boxes, decode_boxes
from ..nms import nms_padded
from ..score_fusion.reference import FUSIONS
from .arguments import DetectionArguments


def detections(args: DetectionArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every class of every RoI is decoded, clipped and tested; the rest is `nms_padded`.

    The results are those of the public function.  Shapes depend on shapes alone.
    """
    scores = class_scores(args.logits, args.fusion)[..., 1:]
    candidate = (scores > args.score_threshold) & args.valid[..., None]
    decoded = decode_boxes(args.deltas[:, :, 1:], args.proposals[:, :, None], args.box_weights).flatten(1, 2)
    boxes = clip_boxes(decoded, args.sizes, args.least_side)
    usable = decoded.isfinite().all(-1) & large(boxes, args.min_size)
    labels = torch.arange(1, scores.shape[2] + 1, device=scores.device)
    groups = torch.where(candidate & usable.view_as(candidate), labels, -1).flatten(1)
    return suppress(boxes, scores.flatten(1), groups, args)


def class_scores(logits: Sequence[Tensor], fusion: str) -> Tensor:
    """One classifier's probabilities, or two classifiers' fused: `Tensor[B, R, C]`."""
    dtype = score_dtype(*logits)
    probabilities = [torch.softmax(item, dim=-1, dtype=dtype) for item in logits]
    return FUSIONS[fusion](*probabilities) if len(probabilities) == 2 else probabilities[0]


def large(boxes: Tensor, min_size: float) -> Tensor:
    """Whether boxes `Tensor[..., 4]` are at least `min_size` wide and high: `Tensor[...]` bool."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return (x2 - x1 >= min_size) & (y2 - y1 >= min_size)


def suppress(
    boxes: Tensor, scores: Tensor, groups: Tensor, args: DetectionArguments
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The best of the candidates `[B, N]`, then zeros; candidates of group -1 do not exist."""
    if boxes.shape[1] == 0:
        return empty_detections(boxes, scores, args.max_detections)
    kept, count = nms_padded(boxes, scores, groups, args.nms_iou, args.max_detections)
    empty = kept < 0
    kept = kept.clamp(min=0)
    return (
        boxes.gather(1, kept[..., None].expand(-1, -1, 4)).masked_fill_(empty[..., None], 0),
        scores.gather(1, kept).masked_fill_(empty, 0),
        groups.gather(1, kept).masked_fill_(empty, 0),
        count,
    )


def empty_detections(boxes: Tensor, scores: Tensor, max_detections: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """No detections, in the dtypes of `boxes` and `scores`, for as many images as these have."""
    batch = boxes.shape[0]
    return (
        boxes.new_zeros((batch, max_detections, 4)),
        scores.new_zeros((batch, max_detections)),
        scores.new_zeros((batch, max_detections), dtype=torch.int64),
        scores.new_zeros((batch,), dtype=torch.int64),
    )
