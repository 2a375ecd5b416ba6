"""Non-maximum suppression in plain PyTorch: the definition, for any device.

The rule, the same in every implementation: box i suppresses box j if

    IoU(i, j) > iou_threshold

where the IoU is computed in float32 (float64 for float64 boxes; float16 and bfloat16 are converted first), in exactly
the operations of `boxes.box_iou` without fused multiply-adds, and then compared with the threshold as a real number,
that is, without rounding the threshold to float32.  So with float32 boxes an IoU of 1/10 (float32: 0.100000001...)
exceeds a threshold of 0.1.  A NaN, from a box with a NaN, without area or too large, exceeds nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..boxes import box_iou


def nms_padded(
    boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float, max_output: int, largest_group: int = 0
) -> tuple[Tensor, Tensor]:
    """Greedy suppression: keep the best box left, strike what it suppresses, and repeat.

    Shapes depend on shapes alone and nothing is read back from the device.  The time is that of `max_output` passes
    over N boxes, the memory a few times that of the input.

    Args:
        boxes: `Tensor[B, N, 4]`.
        scores: `Tensor[B, N]`.
        groups: `Tensor[B, N]` int64; only boxes of one group suppress each other, and those of
            negative groups do not exist.
        iou_threshold: see above.
        max_output: length of the result.
        largest_group: unused; kernels may save work by it.
    Returns:
        indices `Tensor[B, max_output]` int64 by descending score, -1 behind the last, and count `Tensor[B]` int64.
    """
    batch, number = scores.shape
    order = scores.sort(dim=1, descending=True, stable=True).indices  # stable: ties by index; NaN counts as largest
    boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
    groups = groups.gather(1, order)
    left = groups >= 0
    position = torch.arange(number, device=boxes.device)

    kept = []
    for _ in range(min(max_output, number)):
        best = left.byte().argmax(dim=1, keepdim=True)  # the first True: argmax gives the first of equals
        exists = left.gather(1, best)
        kept.append(torch.where(exists, order.gather(1, best), -1))
        iou = box_iou(boxes.gather(1, best[..., None].expand(-1, -1, 4)), boxes)[:, 0]
        struck = (iou.double() > iou_threshold) & (groups == groups.gather(1, best))
        left = left & ~struck & (position != best)

    missing = order.new_full((batch, max_output - len(kept)), -1)
    indices = torch.cat((*kept, missing), dim=1)
    return indices, (indices >= 0).sum(dim=1)


def nms(boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_threshold: float) -> Tensor:
    """All kept indices of one set of boxes, `Tensor[K]` int64: `nms_padded` with room for all, cut to length.

    Args:
        boxes: `Tensor[N, 4]`.
        scores: `Tensor[N]`.
        groups: `Tensor[N]` int64, or None: one group.  Here a negative group is a group like any other.
        iou_threshold: see above.
    """
    if groups is None:
        groups = torch.zeros_like(scores, dtype=torch.int64)
    else:
        groups = groups.unique(return_inverse=True)[1]  # the same partition, numbered from 0
    indices, count = nms_padded(boxes[None], scores[None], groups[None], iou_threshold, scores.shape[0])
    return indices[0, : int(count)]
