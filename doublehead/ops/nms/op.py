"""Non-maximum suppression: `nms_padded` with a fixed-size result, and torchvision's `nms` and `batched_nms`."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import (
    ArgumentTypeError,
    ArgumentValueError,
    check_float,
    check_not_negative,
    check_same_device,
    check_shape,
    check_tensor,
)
from .._library import define, define_autocast, define_vmap, one_thread_if_forked
from . import reference


def nms_padded(
    boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float, max_output: int, largest_group: int = 0
) -> tuple[Tensor, Tensor]:
    """Batched greedy non-maximum suppression with a result of fixed size.

    In each image the boxes are visited by descending score (ties: the lower index first; NaN scores before all others),
    and a box is kept unless its IoU with a kept box of its own group exceeds the threshold.  The IoU is computed in
    float32 (float64 for float64 boxes) without fused multiply-adds, and the threshold is not rounded: an IoU of 1/10,
    0.100000001... in float32, exceeds 0.1.

    Nothing depends on the data in shape and nothing is read back from the device, so the operator
    compiles with `fullgraph=True` and exports.  It is not differentiable.  Work stops once `max_output` boxes are kept,
    which changes no result.

    Args:
        boxes: `Tensor[B, N, 4]` (x1, y1, x2, y2), float16, bfloat16 (both computed as float32), float32 or float64.
            Any unit.  A box with a NaN or infinite coordinate, or without area, is kept and suppresses nothing.
        scores: `Tensor[B, N]`, any of these dtypes, not necessarily that of `boxes`.
        groups: `Tensor[B, N]` int64: class, level, ...  A negative group marks padding: such a box is never returned
            and suppresses nothing.
        iou_threshold: float.
        max_output: int >= 0.
        largest_group: int >= 0, the most boxes that a group of an image can have, where the caller knows; 0: unknown.
            It changes no result, and saves memory on CUDA, where small groups are decided on without a mask.  If a
            group has more boxes after all, some boxes or all of it may be missing from the result there.

    Returns:
        indices: `Tensor[B, max_output]` int64, into N, by descending score over all groups; -1 behind the last.
        count: `Tensor[B]` int64, how many indices are not padding.

    Raises:
        TypeError: an argument's type or dtype is not accepted.
        ValueError: shapes do not fit, devices differ, or `max_output` or `largest_group` is negative.

    Source: the rule of `torchvision.ops.nms` on the CPU; Girshick, Fast R-CNN (2015), section 2.3, class by class.
    """
    _check(boxes, scores, groups, batched=True)
    check_not_negative("max_output", max_output, ArgumentValueError)
    check_not_negative("largest_group", largest_group, ArgumentValueError)
    return _nms_padded(boxes, scores, groups, iou_threshold, max_output, largest_group)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression: `torchvision.ops.nms`, with the same result on valid input.

    Differences: float16 and bfloat16 work on the CPU; `scores` may have another dtype than `boxes`; ties go to the
    lower index and the threshold rule is the same on every device (torchvision's CUDA kernel rounds the threshold to
    float32, so there an IoU of 1/10 does not exceed 0.1; here, as in torchvision on the CPU, it does).

    The result's length depends on the data: under `torch.compile` and `torch.export` it is an unbacked size, and
    `torch.vmap` works where all samples keep equally many.  `nms_padded` has no such limits.

    Args:
        boxes: `Tensor[N, 4]` (x1, y1, x2, y2), floating point; for no boxes a `Tensor[0]` too.
        scores: `Tensor[N]`, floating point.
        iou_threshold: a box is dropped if its IoU with a kept one of higher score exceeds it.

    Returns:
        `Tensor[K]` int64: indices of the kept boxes by descending score.

    Raises:
        TypeError: an argument's type or dtype is not accepted.
        ValueError: shapes do not fit, or devices differ.  Both are RuntimeErrors as well, as torchvision's are.
    """
    if isinstance(boxes, Tensor) and boxes.shape == (0,):
        boxes = boxes.view(0, 4)
    _check(boxes, scores, None, batched=False)
    return _nms(boxes, scores, None, iou_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression within each class: `torchvision.ops.batched_nms`, with the same result on valid input.

    Boxes of different classes are never compared (torchvision moves them apart), so the result is exactly that of `nms`
    class by class, also for negative, infinite or NaN coordinates, any class number, and float16.  Equal scores are
    ordered by index (torchvision's order of ties is unspecified).

    Without boxes the result is empty, whatever the other arguments are, as in torchvision.

    Args:
        boxes: `Tensor[N, 4]` (x1, y1, x2, y2), floating point; for no boxes a tensor of any shape and dtype.
        scores: `Tensor[N]`, floating point.
        idxs: `Tensor[N]`, the class of each box; integers, bool, or floats compared by value.  Any sign.
        iou_threshold: as in `nms`.

    Returns:
        `Tensor[K]` int64: indices of the kept boxes by descending score over all classes.

    Raises:
        TypeError: an argument's type or dtype is not accepted.
        ValueError: shapes do not fit, or devices differ.  Both are RuntimeErrors as well, as torchvision's are.
    """
    if isinstance(boxes, Tensor) and _is_empty(boxes):
        return torch.empty(0, dtype=torch.int64, device=boxes.device)
    check_tensor("idxs", idxs, "a Tensor[N]")
    _check(boxes, scores, idxs, batched=False)
    with one_thread_if_forked():
        groups = _as_groups(idxs)
    return _nms(boxes, scores, groups, iou_threshold)


def _is_empty(boxes: Tensor) -> bool:
    """Whether there are no boxes; in a traced program, whose sizes may be unknown, only where the shape says so."""
    if torch.compiler.is_compiling() and boxes.dim() == 2:
        return False  # the operator serves [0, 4]
    return boxes.numel() == 0


def _as_groups(idxs: Tensor) -> Tensor:
    if idxs.is_floating_point():  # equal floats have equal bits once -0.0 is gone
        return idxs.double().masked_fill(idxs == 0, 0.0).view(torch.int64)
    return idxs.to(torch.int64)


# ---------------------------------------------------------------------------------------------
# Argument checks


def _check(boxes: Tensor, scores: Tensor, groups: Tensor | None, *, batched: bool) -> None:
    of_boxes, of_scores = ("[B, N, 4]", "[B, N]") if batched else ("[N, 4]", "[N]")
    if not (isinstance(boxes, Tensor) and isinstance(scores, Tensor)):
        check_tensor("boxes", boxes, f"a Tensor{of_boxes}")
        check_tensor("scores", scores, f"a Tensor{of_scores}")
    if boxes.dim() != (3 if batched else 2) or boxes.shape[-1] != 4:
        raise ArgumentValueError(f"boxes must have shape {of_boxes}, got {list(boxes.shape)}")
    check_shape("scores", scores, boxes.shape[:-1], of_scores, "boxes", ArgumentValueError)
    check_float("boxes", boxes, ArgumentTypeError)
    check_float("scores", scores, ArgumentTypeError)
    check_same_device("scores", scores, "boxes", boxes, ArgumentValueError)
    if batched or groups is not None:
        _check_groups(boxes, groups, batched, of_scores)


def _check_groups(boxes: Tensor, groups: Tensor, batched: bool, letters: str) -> None:
    name = "groups" if batched else "idxs"
    check_tensor(name, groups, f"a Tensor{letters}")
    check_shape(name, groups, boxes.shape[:-1], letters, "boxes", ArgumentValueError)
    if batched and groups.dtype != torch.int64:
        raise ArgumentTypeError(f"groups must be int64, got {groups.dtype}")
    if groups.dtype.is_complex:
        raise ArgumentTypeError(f"{name} must be integers or floats, got {groups.dtype}")
    check_same_device(name, groups, "boxes", boxes, ArgumentValueError)


# ---------------------------------------------------------------------------------------------
# Registration


def _fake_nms_padded(boxes, scores, groups, iou_threshold, max_output, largest_group=0):
    indices = boxes.new_empty((boxes.shape[0], max_output), dtype=torch.int64)
    return indices, boxes.new_empty((boxes.shape[0],), dtype=torch.int64)


def _fake_nms(boxes, scores, groups, iou_threshold):
    kept = torch.library.get_ctx().new_dynamic_size(min=0)
    return boxes.new_empty((kept,), dtype=torch.int64)


_nms_padded = define(
    "nms_padded(Tensor boxes, Tensor scores, Tensor groups, float iou_threshold, SymInt max_output,"
    " SymInt largest_group=0) -> (Tensor indices, Tensor count)",
    reference=reference.nms_padded,
    fake=_fake_nms_padded,
)
_nms = define(
    "nms(Tensor boxes, Tensor scores, Tensor? groups, float iou_threshold) -> Tensor",
    reference=reference.nms,
    fake=_fake_nms,
)

# Autocast changes nothing: the result is made of integers, and 16-bit boxes are computed in float32 anyway.
define_autocast("nms_padded", lambda *arguments: _nms_padded(*arguments))
define_autocast("nms", lambda *arguments: _nms(*arguments))


def _batch_first(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    if tensor is None:
        return None
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _vmap_nms_padded(info, in_dims, boxes, scores, groups, iou_threshold, max_output, largest_group=0):
    size = info.batch_size
    folded = [
        _batch_first(tensor, dim, size).flatten(0, 1)
        for tensor, dim in zip((boxes, scores, groups), in_dims[:3], strict=True)
    ]
    indices, count = _nms_padded(*folded, iou_threshold, max_output, largest_group)
    return (indices.unflatten(0, (size, -1)), count.unflatten(0, (size, -1))), (0, 0)


def _vmap_nms(info, in_dims, boxes, scores, groups, iou_threshold):
    boxes, scores, groups = (
        _batch_first(tensor, dim, info.batch_size)
        for tensor, dim in zip((boxes, scores, groups), in_dims[:3], strict=True)
    )
    groups = torch.zeros_like(scores, dtype=torch.int64) if groups is None else groups.unique(return_inverse=True)[1]
    indices, count = _nms_padded(boxes, scores, groups, iou_threshold, scores.shape[1])
    counts = count.unique().tolist()
    if len(counts) > 1:
        raise ValueError(
            f"nms under torch.vmap: the samples keep between {counts[0]} and {counts[-1]} boxes, which form no tensor; "
            "nms_padded gives results of one size"
        )
    return indices[:, : counts[0] if counts else 0], 0


define_vmap("nms_padded", _vmap_nms_padded)
define_vmap("nms", _vmap_nms)
