"""Detections on the CPU: what passes the threshold is counted and copied out first, and only that is decoded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..boxes import clip_boxes, decode_boxes
from . import reference

#: From one candidate in this many on it is quicker to decode all boxes than to copy the candidates out.
DENSE = 3


def detections(
    logits: Sequence[Tensor],
    deltas: Tensor,
    proposals: Tensor,
    valid: Tensor,
    sizes: Tensor,
    fusion: str,
    score_threshold: float,
    nms_iou: float,
    max_detections: int,
    min_size: float,
    least_side: float,
    box_weights: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Equals `reference.detections`, bit by bit."""
    scores = reference.class_scores(logits, fusion)[..., 1:]
    candidate = (scores > score_threshold) & valid[..., None]
    if int(candidate.count_nonzero()) * DENSE > candidate.numel():
        decoded = decode_boxes(deltas[:, :, 1:], proposals[:, :, None], box_weights).flatten(1, 2)
        boxes = clip_boxes(decoded, sizes, least_side)
        labels = torch.arange(1, scores.shape[2] + 1)
        groups = torch.where(candidate & sound(decoded, boxes, min_size).view_as(candidate), labels, -1).flatten(1)
        return reference.suppress(boxes, scores.flatten(1), groups, nms_iou, max_detections)
    image, roi, column = candidate.nonzero(as_tuple=True)
    labels = column + 1
    decoded = decode_boxes(deltas[image, roi, labels], proposals[image, roi], box_weights)
    boxes = clip_boxes(decoded[:, None], sizes[image], least_side)[:, 0]
    groups = torch.where(sound(decoded, boxes, min_size), labels, -1)
    padded = pad_images(image, valid.shape[0], boxes, scores[image, roi, column], groups)
    return reference.suppress(*padded, nms_iou, max_detections)


def sound(decoded: Tensor, clipped: Tensor, min_size: float) -> Tensor:
    """Which boxes are finite before clipping and large enough after it, looked at one by one only if need be."""
    large = reference.large(clipped, min_size)
    return large if decoded.sum().isfinite() else large & decoded.isfinite().all(-1)


def pad_images(image: Tensor, images: int, boxes: Tensor, scores: Tensor, groups: Tensor) -> tuple[Tensor, ...]:
    """Candidates of all images, image by image, as `[images, most of one image]`; padding has the group -1."""
    if images == 1:
        return boxes[None], scores[None], groups[None]
    counts = image.bincount(minlength=images)
    place = torch.arange(len(image)) - (counts.cumsum(0) - counts)[image]
    shape = (images, int(counts.max()) if images else 0)
    padded = boxes.new_zeros((*shape, 4)), scores.new_zeros(shape), groups.new_full(shape, -1)
    for target, source in zip(padded, (boxes, scores, groups), strict=True):
        target[image, place] = source
    return padded
