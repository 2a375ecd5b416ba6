"""Which RoIs a head has to see at inference, so that it does not work on what cannot become a detection."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SLACK = 1e-3
"""Relative: another kernel may round the score a little differently, and must find no RoI missing."""


class Selection(NamedTuple):
    """Some of K RoIs, brought to the front."""

    order: Tensor
    """`Tensor[K]` int64: the selected RoIs in their order, then the others in theirs."""
    count: Tensor
    """`Tensor[]` int64: how many are selected."""


def may_be_detected(logits: Tensor, threshold: float) -> Tensor:
    """Whether the largest foreground score passes `threshold`, or nearly: `Tensor[..., C]` -> bool `Tensor[...]`.

    A row that is not finite does not pass: it becomes no detection either.
    """
    if logits.shape[-1] == 1:
        return torch.zeros_like(logits[..., 0], dtype=torch.bool)
    best = torch.softmax(logits, dim=-1)[..., 1:].amax(-1)
    return best > threshold * (1 - SLACK)


def bring_to_front(selected: Tensor) -> Selection:
    """`selected`: bool `Tensor[K]`.  Without sorting, and without reading anything back."""
    count = selected.sum()
    ahead = torch.where(selected, selected.cumsum(0) - 1, count + (~selected).cumsum(0) - 1)
    order = torch.empty_like(ahead).scatter_(0, ahead, torch.arange(selected.shape[0], device=selected.device))
    return Selection(order, count)


def select_boxes(boxes: Tensor, selection: Selection) -> Tensor:
    """RoIs in the selection's order, ready to be pooled; those not selected are NaN, and pool zeros.

    Args:
        boxes: `Tensor[B, R, 4]`.
        selection: the selection among the B * R RoIs.

    Returns:
        `Tensor[B * R, 5]` (image, x1, y1, x2, y2).
    """
    rois = with_images(boxes)[selection.order]
    beyond = torch.arange(rois.shape[0], device=boxes.device) >= selection.count
    coordinates = torch.where(beyond[:, None], torch.nan, rois[:, 1:])
    return torch.cat((rois[:, :1], coordinates), dim=1)


def with_images(boxes: Tensor) -> Tensor:
    """`Tensor[B, R, 4]` -> `Tensor[B * R, 5]`: each box with the number of its image in front."""
    batch, slots, _ = boxes.shape
    image = torch.arange(batch, device=boxes.device, dtype=boxes.dtype).repeat_interleave(slots)
    return torch.cat((image[:, None], boxes.flatten(0, 1)), dim=1)


def restore(values: Tensor, selection: Selection) -> Tensor:
    """Rows back in their places: `values[i]` belongs to RoI `selection.order[i]`."""
    return torch.empty_like(values).index_copy_(0, selection.order, values)
