"""Which ground-truth box each anchor or proposal belongs to, and which of them to learn from."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.boxes import box_iou
from .structures import Targets

IGNORE = -1


def match(boxes: Tensor, targets: Targets, positive: float, negative: float, keep_best: bool) -> tuple[Tensor, Tensor]:
    """Assign each box to the ground-truth box it overlaps most (Ren et al. 2015, section 3.1.2).

    Args:
        boxes: `Tensor[N, 4]` (the same anchors for every image) or `Tensor[B, N, 4]`.
        targets: ground truth of B images.
        positive: IoU from which a box counts as the object.
        negative: IoU under which a box counts as background; in between it is ignored.
        keep_best: the boxes that overlap a ground-truth box most count as positive however
            small that IoU is (but over zero).

    Returns:
        matched `Tensor[B, N]`, int64: index of the ground-truth box (0 where there is none).
        state `Tensor[B, N]`, int64: 1 positive, 0 background, -1 ignored.
    """
    iou = box_iou(targets.boxes, boxes)  # [B, G, N]
    iou = torch.where(targets.valid[:, :, None], iou, iou.new_full((), -1.0))
    overlap, matched = iou.max(dim=1)
    is_positive = overlap >= positive
    if keep_best:
        best = iou.amax(dim=2, keepdim=True)
        is_positive = is_positive | ((iou == best) & (best > 0)).any(dim=1)
    state = torch.where(overlap < negative, 0, IGNORE)
    return matched, torch.where(is_positive, 1, state)


def sample(state: Tensor, count: int, positive_fraction: float) -> tuple[Tensor, Tensor]:
    """Draw a fixed number of slots per image at random, positives up to a share of them.

    Args:
        state: `Tensor[B, N]`: 1 positive, 0 background, anything else is never drawn.
        count: slots to draw per image.
        positive_fraction: the largest share of positives; background fills the rest.

    Returns:
        indices `Tensor[B, K]`, int64, K = min(count, N): the drawn ones first, positives before background.
        drawn `Tensor[B, K]`, bool: False where too few could be drawn.
    """
    slots = min(count, state.shape[1])
    draw = torch.rand(state.shape, device=state.device)
    positives = torch.where(state == 1, draw + 2, IGNORE).topk(min(int(count * positive_fraction), slots), dim=1)
    background = torch.where(state == 0, draw + 1, IGNORE).topk(slots, dim=1)
    candidates = torch.cat([positives.indices, background.indices], dim=1)
    priority, best = torch.cat([positives.values, background.values], dim=1).topk(slots, dim=1)
    return candidates.gather(1, best), priority > 0
