"""What flows through the detector: padded, fixed-size batches.

Every tensor has one row per image and a fixed number of slots; masks and counts say which slots
are filled.  So no shape depends on the data, and the whole path from pixels to detections
compiles, exports and runs without waiting for the device.

Boxes are (x1, y1, x2, y2) in pixels of the resized image, continuous coordinates: a box's width
is x2 - x1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class ImageBatch(NamedTuple):
    """Normalised images, padded at the right and bottom to a common size."""

    pixels: Tensor
    """`Tensor[B, 3, H, W]`, float."""
    sizes: Tensor
    """`Tensor[B, 2]`, float32: (height, width) of each image without its padding."""


class Targets(NamedTuple):
    """Ground truth; a slot with label 0 is empty."""

    boxes: Tensor
    """`Tensor[B, G, 4]`, float32."""
    labels: Tensor
    """`Tensor[B, G]`, int64: 1 .. classes - 1; 0 marks an empty slot."""

    @property
    def valid(self) -> Tensor:
        """`Tensor[B, G]`, bool: the filled slots."""
        return self.labels > 0


class Proposals(NamedTuple):
    """Boxes that may hold an object; filled slots come first."""

    boxes: Tensor
    """`Tensor[B, R, 4]`, float32; zeros in empty slots."""
    valid: Tensor
    """`Tensor[B, R]`, bool."""


class RoISamples(NamedTuple):
    """The RoIs a training step learns from, with what each should become."""

    boxes: Tensor
    """`Tensor[B, R, 4]`, float32."""
    valid: Tensor
    """`Tensor[B, R]`, bool: False repeats another RoI to keep the size fixed, and carries no loss."""
    labels: Tensor
    """`Tensor[B, R]`, int64: 0 is background."""
    matched_boxes: Tensor
    """`Tensor[B, R, 4]`, float32: the ground-truth box of each RoI (any box for background)."""


class Detections(NamedTuple):
    """Final boxes, best score first, zeros in empty slots."""

    boxes: Tensor
    """`Tensor[B, D, 4]`, float32."""
    scores: Tensor
    """`Tensor[B, D]`, float32."""
    labels: Tensor
    """`Tensor[B, D]`, int64; 0 in empty slots."""
    count: Tensor
    """`Tensor[B]`, int64: filled slots of each image."""
    rois: Tensor | None = None
    """`Tensor[B]`, int64: how many RoIs each image had."""
    box_rois: Tensor | None = None
    """`Tensor[B]`, int64: how many of them went through the head that gives the boxes."""


def pad_targets(boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> Targets:
    """Stack the ground truth of several images into one padded batch (at least one slot wide).

    Args:
        boxes: per image `Tensor[n, 4]`.
        labels: per image `Tensor[n]`, int64.
    """
    width = max(1, *(len(item) for item in labels))
    padded_boxes = boxes[0].new_zeros((len(boxes), width, 4), dtype=torch.float32)
    padded_labels = labels[0].new_zeros((len(labels), width), dtype=torch.int64)
    for row, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        padded_boxes[row, : len(box)] = box
        padded_labels[row, : len(label)] = label
    return Targets(padded_boxes, padded_labels)


def gather_rows(values: Tensor, indices: Tensor) -> Tensor:
    """Pick rows of each image: `values[B, N, *]`, `indices[B, K]` -> `Tensor[B, K, *]`."""
    trailing = values.shape[2:]
    index = indices.reshape(*indices.shape, *(1 for _ in trailing)).expand(*indices.shape, *trailing)
    return values.gather(1, index)


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision becomes float32, anything wider stays: boxes and scores need it under autocast."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
