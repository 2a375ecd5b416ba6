"""Detections on the CPU: only candidates that pass the threshold are copied out and decoded."""

from __future__ import annotations

import torch
from torch import Tensor

from ..boxes import clip_boxes, decode_boxes
from . import reference
from .arguments import DetectionArguments

#: If more than one box in this many is a candidate, decoding all boxes is faster than copying the candidates out.
DENSE = 3


def detections(args: DetectionArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Equals `reference.detections`, bit by bit."""
    scores = reference.class_scores(args.logits, args.fusion)[..., 1:]
    candidate = (scores > args.score_threshold) & args.valid[..., None]
    if int(candidate.count_nonzero()) * DENSE > candidate.numel():
        boxes, groups = _decode_all(args, candidate)
        return reference.suppress(boxes, scores.flatten(1), groups, args)
    image, roi, column = candidate.nonzero(as_tuple=True)
    labels = column + 1
    decoded = decode_boxes(args.deltas[image, roi, labels], args.proposals[image, roi], args.box_weights)
    boxes = clip_boxes(decoded[:, None], args.sizes[image], args.least_side)[:, 0]
    groups = torch.where(usable(decoded, boxes, args.min_size), labels, -1)
    padded = pad_images(image, args.valid.shape[0], boxes, scores[image, roi, column], groups)
    return reference.suppress(*padded, args)


def _decode_all(args: DetectionArguments, candidate: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes `Tensor[B, R * C, 4]` of every foreground class of every RoI, and their groups: the class, or -1."""
    decoded = decode_boxes(args.deltas[:, :, 1:], args.proposals[:, :, None], args.box_weights).flatten(1, 2)
    boxes = clip_boxes(decoded, args.sizes, args.least_side)
    labels = torch.arange(1, candidate.shape[2] + 1)
    takes_part = candidate & usable(decoded, boxes, args.min_size).view_as(candidate)
    return boxes, torch.where(takes_part, labels, -1).flatten(1)


def usable(decoded: Tensor, clipped: Tensor, min_size: float) -> Tensor:
    """Whether boxes are finite before clipping and large enough after it; single boxes are tested only if need be."""
    large = reference.large(clipped, min_size)
    return large if decoded.sum().isfinite() else large & decoded.isfinite().all(-1)


def pad_images(image: Tensor, images: int, boxes: Tensor, scores: Tensor, groups: Tensor) -> tuple[Tensor, ...]:
    """Candidates of all images, image by image, as `[images, most of one image]`; padding has the group -1."""
    if images == 1:
        return boxes[None], scores[None], groups[None]
    counts = image.bincount(minlength=images)
    position = torch.arange(len(image)) - (counts.cumsum(0) - counts)[image]
    shape = (images, int(counts.max()) if images else 0)
    padded = boxes.new_zeros((*shape, 4)), scores.new_zeros(shape), groups.new_full(shape, -1)
    for target, source in zip(padded, (boxes, scores, groups), strict=True):
        target[image, position] = source
    return padded
