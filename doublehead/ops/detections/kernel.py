"""Triton kernels of the detections: from a RoI's logits to its few candidates, and from kept candidates to the result.

`nms_padded` runs between the two.  Nothing waits for the device, and sizes depend on shapes and options alone.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import next_power_of_2
from ..nms import nms_padded
from ..score_fusion.kernel import fuse, serves, softmax_row, warps
from . import reference
from .arguments import DetectionArguments

#: Detections written by one program of the second kernel.
BLOCK_DETECTIONS = 128

#: The bound of `boxes.decode_boxes` for the logarithms of a box's sides.
MAX_LOG_RATIO = tl.constexpr(math.log(1000 / 16))


def candidate_slots(classes: int, fusion: str, score_threshold: float) -> int:
    """The number of slots that hold all foreground classes of a RoI whose scores exceed the threshold; at least one.

    With probabilities f and c of two heads, a score is at most f + c, or for one head, "none" and "average" the scores
    of a row sum to at most 1.  So the scores sum to at most `total` = 2 or 1, and fewer than total / threshold exceed
    the threshold.  Rounding, in units of u = 2^-24: a softmax divides each of C non-negative numbers by their computed
    sum, which is off by at most C - 1 roundings in any order of addition, and the division by one more; the fusion
    rounds each score up at most three times, the threshold was rounded once.  Each is a factor of at most 1 + u; that
    product is below 1 + 2u (C + 16), as C u is small.
    """
    foreground = classes - 1
    total = 2 if fusion in ("complementary", "max") else 1
    most = total * (1 + (classes + 16) * 2.0**-23)
    if score_threshold * foreground <= most:  # a low threshold, zero and negative ones among them, excludes no class
        return foreground
    return max(1, int(most / score_threshold))


@triton.jit
def _minimum(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _clip(x, least, limit):
    return _minimum(tl.maximum(x, least, propagate_nan=tl.PropagateNan.ALL), limit)


@triton.jit
def _finite(x):
    return tl.abs(x) < float("inf")  # false for NaN


@triton.jit
def _decode_axis(low, high, shift, log_ratio, shift_weight, ratio_weight):
    """One axis of `boxes.decode_boxes`, operation by operation: both ends of the moved interval."""
    size = high - low
    centre = tl.div_rn(shift, shift_weight) * size + (low + 0.5 * size)
    half = 0.5 * (tl.exp(_minimum(tl.div_rn(log_ratio, ratio_weight), MAX_LOG_RATIO)) * size)
    return centre - half, centre + half


# Numbers of RoIs differ from batch to batch: kernels specialised to them would be compiled again and again.
@triton.jit(do_not_specialize=["rois"])
def _candidates(
    fc_logits, conv_logits, deltas, proposals, valid, sizes, boxes, scores, groups, rois, classes, slots,
    threshold, min_size, least_side, weight_x, weight_y, weight_w, weight_h,
    FUSION: tl.constexpr, BLOCK_CLASSES: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """One RoI: its candidates fill the first of its slots in the order of classes; the others get the group -1."""
    row = tl.program_id(0).to(tl.int64)
    image = row // rois
    label = tl.arange(0, BLOCK_CLASSES)
    score = softmax_row(fc_logits, row, label, classes)
    if FUSION != "none":
        score = fuse(score, softmax_row(conv_logits, row, label, classes), FUSION)
    to_exceed = tl.where(tl.load(valid + row) != 0, threshold, float("inf"))
    takes_part = (score > to_exceed) & (label > 0) & (label < classes)

    delta = deltas + (row * classes + label) * 4
    dx = tl.load(delta, mask=takes_part, other=0.0).to(tl.float32)
    dy = tl.load(delta + 1, mask=takes_part, other=0.0).to(tl.float32)
    dw = tl.load(delta + 2, mask=takes_part, other=0.0).to(tl.float32)
    dh = tl.load(delta + 3, mask=takes_part, other=0.0).to(tl.float32)
    proposal = proposals + row * 4
    left, top = tl.load(proposal).to(tl.float32), tl.load(proposal + 1).to(tl.float32)
    right, bottom = tl.load(proposal + 2).to(tl.float32), tl.load(proposal + 3).to(tl.float32)
    height, width = tl.load(sizes + image * 2).to(tl.float32), tl.load(sizes + image * 2 + 1).to(tl.float32)

    x1, x2 = _decode_axis(left, right, dx, dw, weight_x, weight_w)
    y1, y2 = _decode_axis(top, bottom, dy, dh, weight_y, weight_h)
    takes_part &= _finite(x1) & _finite(y1) & _finite(x2) & _finite(y2)
    x1, y1 = _clip(x1, 0.0, width - least_side), _clip(y1, 0.0, height - least_side)
    x2, y2 = _clip(x2, least_side, width), _clip(y2, least_side, height)
    takes_part &= (x2 - x1 >= min_size) & (y2 - y1 >= min_size)

    number = takes_part.to(tl.int32)
    rank = tl.cumsum(number, 0) - 1
    takes_part &= rank < slots  # always, by `candidate_slots`; a guard for the other rows
    target = row * slots + rank
    tl.store(boxes + target * 4, x1, mask=takes_part)
    tl.store(boxes + target * 4 + 1, y1, mask=takes_part)
    tl.store(boxes + target * 4 + 2, x2, mask=takes_part)
    tl.store(boxes + target * 4 + 3, y2, mask=takes_part)
    tl.store(scores + target, score, mask=takes_part)
    tl.store(groups + target, label, mask=takes_part)

    slot = tl.arange(0, BLOCK_SLOTS)
    unused = (slot >= tl.sum(number, 0)) & (slot < slots)
    tl.store(scores + row * slots + slot, -float("inf"), mask=unused)  # behind all others, wherever they are sorted
    tl.store(groups + row * slots + slot, -1, mask=unused)


@triton.jit(do_not_specialize=["candidates"])
def _gather(
    kept, boxes, scores, groups, kept_boxes, kept_scores, kept_labels, candidates, detections, BLOCK: tl.constexpr
):
    """The detections of one image: candidates `kept`, zeros where that is -1."""
    image = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = position < detections
    target = image * detections + position
    index = tl.load(kept + target, mask=inside, other=-1)
    exists = index >= 0
    source = image * candidates + index
    tl.store(kept_scores + target, tl.load(scores + source, mask=exists, other=0.0), mask=inside)
    tl.store(kept_labels + target, tl.load(groups + source, mask=exists, other=0), mask=inside)
    corner = tl.arange(0, 4)[None, :]
    box = tl.load(boxes + source[:, None] * 4 + corner, mask=exists[:, None], other=0.0)
    tl.store(kept_boxes + target[:, None] * 4 + corner, box, mask=inside[:, None])


def detections(args: DetectionArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches the kernels; results as in `reference.detections`."""
    in_float32 = serves(*args.logits) and torch.float64 not in (args.deltas.dtype, args.proposals.dtype)
    if not in_float32 or args.logits[0].shape[-1] == 1 or args.max_detections == 0:
        return reference.detections(args)
    boxes, scores, groups = candidates(args)
    rois = args.logits[0].shape[1]  # a class has a box of each at most
    kept, count = nms_padded(boxes, scores, groups, args.nms_iou, args.max_detections, rois)
    return *gather(kept, boxes, scores, groups), count


def candidates(args: DetectionArguments) -> tuple[Tensor, Tensor, Tensor]:
    """The candidates of all RoIs and classes: boxes `[B, R * S, 4]`, scores and groups (class, or -1) `[B, R * S]`."""
    logits, device = args.logits, args.deltas.device
    fusion = args.fusion if len(logits) == 2 else "none"
    batch, rois, classes = logits[0].shape
    slots = candidate_slots(classes, fusion, args.score_threshold)
    shape = (batch, rois * slots)
    boxes = torch.empty((*shape, 4), dtype=torch.float32, device=device)
    scores = torch.empty(shape, dtype=torch.float32, device=device)
    groups = torch.empty(shape, dtype=torch.int64, device=device)
    block = next_power_of_2(classes)
    _candidates[(batch * rois,)](
        logits[0].contiguous(), logits[-1].contiguous(), args.deltas.contiguous(), args.proposals.contiguous(),
        args.valid.contiguous().view(torch.uint8), args.sizes.contiguous(), boxes, scores, groups, rois, classes,
        slots, args.score_threshold, args.min_size, args.least_side, *args.box_weights,
        FUSION=fusion, BLOCK_CLASSES=block, BLOCK_SLOTS=next_power_of_2(slots), num_warps=warps(block),
        enable_fp_fusion=False,  # boxes as PyTorch computes them: no product and sum in one rounding
    )  # fmt: skip
    return boxes, scores, groups


def gather(kept: Tensor, boxes: Tensor, scores: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes `[B, D, 4]`, scores and labels `[B, D]` of the candidates `kept` `[B, D]`; zeros where that is -1."""
    batch, number = kept.shape
    kept_boxes = torch.empty((batch, number, 4), dtype=boxes.dtype, device=boxes.device)
    kept_scores, kept_labels = torch.empty_like(kept, dtype=scores.dtype), torch.empty_like(kept)
    _gather[(batch, triton.cdiv(number, BLOCK_DETECTIONS))](
        kept, boxes, scores, groups, kept_boxes, kept_scores, kept_labels, scores.shape[1], number,
        BLOCK=BLOCK_DETECTIONS, num_warps=4,
    )  # fmt: skip
    return kept_boxes, kept_scores, kept_labels
