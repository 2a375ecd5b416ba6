"""Detections on the CPU: what passes the threshold is counted and copied out first, and only that is decoded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..boxes import clip_boxes, decode_boxes
from . import reference


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
    box_weights: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Equals `reference.detections`, bit by bit."""
    scores = reference.class_scores(logits, fusion)[..., 1:]
    image, roi, column = ((scores > score_threshold) & valid[..., None]).nonzero(as_tuple=True)
    scores = scores[image, roi, column]
    labels = column + 1
    decoded = decode_boxes(deltas[image, roi, labels], proposals[image, roi], box_weights)
    boxes = clip_boxes(decoded[:, None], sizes[image])[:, 0]
    groups = torch.where(reference.sound(decoded, boxes, min_size), labels, -1)
    padded = pad_images(image, valid.shape[0], boxes, scores, groups)
    return reference.suppress(*padded, nms_iou, max_detections)


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
