"""The arguments of the detections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class DetectionArguments(NamedTuple):
    """What the heads say of each RoI, and what makes a detection; see `detections`.

    The fields are the arguments of the operator's schema, in its order.
    """

    logits: Sequence[Tensor]
    """One or two classifiers' `Tensor[B, R, C]`."""
    deltas: Tensor
    """`Tensor[B, R, C, 4]`"""
    proposals: Tensor
    """`Tensor[B, R, 4]`"""
    valid: Tensor
    """`Tensor[B, R]` bool."""
    sizes: Tensor
    """`Tensor[B, 2]`: (height, width) of each image."""
    fusion: str
    score_threshold: float
    nms_iou: float
    max_detections: int
    min_size: float
    """Least width and height of a detection, in pixels."""
    least_side: float
    """Pixels that clipping leaves of a box outside of the image."""
    box_weights: Sequence[float]
    """Factors of (dx, dy, dw, dh)."""
