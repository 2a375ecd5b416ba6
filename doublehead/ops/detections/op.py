"""Detections in one pass: the function and the operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._checks import (
    check_choice,
    check_float,
    check_not_negative,
    check_same_device,
    check_shape,
    check_tensor,
    refuse,
)
from .._dtypes import box_dtype, score_dtype
from .._library import below_autograd, define, define_autocast, define_autograd, define_cpu_kernel, define_triton_kernel
from ..score_fusion.reference import FUSIONS
from . import by_class, cpu, reference
from .arguments import DetectionArguments


def detections(
    logits: Sequence[Tensor],
    deltas: Tensor,
    proposals: Tensor,
    valid: Tensor,
    sizes: Tensor,
    *,
    fusion: str = "complementary",
    score_threshold: float = 0.05,
    nms_iou: float = 0.5,
    max_detections: int = 100,
    min_size: float = 1e-2,
    least_side: float = 0.0,
    box_weights: Sequence[float] = (10.0, 10.0, 5.0, 5.0),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best boxes of each image: scores, threshold, decoding, clipping, and NMS class by class.

    A candidate is a foreground class (class 0 is background) of a valid RoI.  Its score is the softmax of the logits,
    with two classifiers fused as in `fuse_scores`; its box is the proposal moved by the class's deltas (`decode_boxes`)
    and clipped to the image.  Candidates take part whose score exceeds `score_threshold`, whose box is finite before it
    is clipped, and at least `min_size` wide and high after.  So a NaN or infinity removes what depends on it
    and nothing else: a NaN or +inf logit all classes of its RoI, a delta its class, a proposal its RoI; -inf excludes a
    class.

    Nothing depends on the data in shape and nothing is read back from the device, so the operator compiles with
    `fullgraph=True` and exports.  It is not differentiable.  16-bit inputs are computed in float32.

    Args:
        logits: one classifier's `Tensor[B, R, C]`, or two, the fc-head's first; float16, bfloat16, float32 or float64.
        deltas: `Tensor[B, R, C, 4]` (dx, dy, dw, dh), any of these dtypes.
        proposals: `Tensor[B, R, 4]` (x1, y1, x2, y2) in pixels, any of these dtypes.
        valid: `Tensor[B, R]` bool: the RoIs that exist.
        sizes: `Tensor[B, 2]` (height, width) of each image in pixels, any real dtype.
        fusion: "complementary" (Equation 4), "max", "average" or "none" (the first classifier alone); with one
            classifier it changes nothing.
        score_threshold: compared in the dtype of the scores.
        nms_iou: a box is dropped if its IoU with a better one of its class exceeds it, as in `nms_padded`.
        max_detections: D, at least 0.
        min_size: in pixels.
        least_side: pixels that clipping leaves of a box outside of the image: see `clip_boxes`.
        box_weights: the box coder's weights, the factors that (dx, dy, dw, dh) were encoded with.

    Returns:
        boxes: `Tensor[B, D, 4]` in pixels, float32 (float64 if `deltas` or `proposals` are).
        scores: `Tensor[B, D]`, float32 (float64 if a classifier's logits are), descending; ties by RoI, then class.
        labels: `Tensor[B, D]` int64, from 1.
        count: `Tensor[B]` int64, how many detections there are; behind them all is zero.

    Raises:
        TypeError: not a tensor, or a dtype that is not accepted.
        ValueError: shapes do not fit, devices differ, or an option is out of range.

    Source: Wu et al., Rethinking Classification and Localization for Object Detection (2020), section 4.2; Girshick,
    Fast R-CNN (2015), section 2.3, for the suppression class by class.
    """
    if not isinstance(logits, (list, tuple)):
        refuse("logits", logits, "a list of 1 or 2 Tensor[B, R, C]")
    logits = tuple(logits)
    _check_tensors(logits, deltas, proposals, valid, sizes)
    check_choice("fusion", fusion, FUSIONS)
    if score_threshold != score_threshold:  # torch.compile cannot trace math.isnan of a float it does not know
        raise ValueError("score_threshold must be a number, got nan")
    check_not_negative("max_detections", max_detections)
    if len(box_weights) != 4 or not all(box_weights):
        raise ValueError(f"box_weights must be 4 numbers other than 0 (dx, dy, dw, dh), got {tuple(box_weights)}")
    args = DetectionArguments(
        logits, deltas, proposals, valid, sizes, fusion, score_threshold, nms_iou, max_detections, min_size,
        least_side, tuple(box_weights),
    )  # fmt: skip
    if torch.compiler.is_compiling():
        return _detections(*args)
    with below_autograd():  # there is no gradient to record, and the call is shorter
        return _detections(*args)


def _check_tensors(logits: Sequence[Tensor], deltas: Tensor, proposals: Tensor, valid: Tensor, sizes: Tensor) -> None:
    if len(logits) not in (1, 2):
        raise ValueError(f"logits must be those of 1 or 2 classifiers, got {len(logits)} tensors")
    first = logits[0]
    check_tensor("logits[0]", first, "a Tensor[B, R, C]")
    if first.dim() != 3 or first.shape[2] == 0:
        raise ValueError(f"logits[0] must have shape [B, R, C] with C >= 1, got {list(first.shape)}")
    batch, rois, classes = first.shape
    others = {
        **{f"logits[{i}]": (tensor, "[B, R, C]", (batch, rois, classes)) for i, tensor in enumerate(logits)},
        "deltas": (deltas, "[B, R, C, 4]", (batch, rois, classes, 4)),
        "proposals": (proposals, "[B, R, 4]", (batch, rois, 4)),
        "valid": (valid, "[B, R]", (batch, rois)),
        "sizes": (sizes, "[B, 2]", (batch, 2)),
    }
    for name, (tensor, letters, shape) in others.items():
        check_tensor(name, tensor, f"a Tensor{letters}")
        check_shape(name, tensor, shape, letters, "logits[0]")
        check_same_device(name, tensor, "logits[0]", first)
        if name not in ("valid", "sizes"):
            check_float(name, tensor)
    if valid.dtype != torch.bool:
        raise TypeError(f"valid must be bool, got {valid.dtype}")
    if sizes.dtype.is_complex or sizes.dtype == torch.bool:
        raise TypeError(f"sizes must be real numbers, got {sizes.dtype}")


# ---------------------------------------------------------------------------------------------
# Registration


def _fake(args: DetectionArguments):
    deltas, number = args.deltas, args.max_detections
    batch = deltas.shape[0]
    return (
        deltas.new_empty((batch, number, 4), dtype=box_dtype(deltas, args.proposals)),
        deltas.new_empty((batch, number), dtype=score_dtype(*args.logits)),
        deltas.new_empty((batch, number), dtype=torch.int64),
        deltas.new_empty((batch,), dtype=torch.int64),
    )


def _define(name: str, fusion: str, function: Callable) -> torch._ops.OpOverload:
    return define(
        f"{name}(Tensor[] logits, Tensor deltas, Tensor proposals, Tensor valid, Tensor sizes, {fusion} fusion, "
        "float score_threshold, float nms_iou, SymInt max_detections, float min_size, float least_side, "
        "float[] box_weights)"
        " -> (Tensor boxes, Tensor scores, Tensor labels, Tensor count)",
        reference=function,
        fake=_fake,
        pack=lambda *arguments: (DetectionArguments(*arguments),),
    )


_detections = _define("detections", "str", reference.detections)
# What `by_class` serves on CUDA.
_define("detections_by_class", "int", lambda args: reference.detections(by_class.with_name(args)))


def _backward(ctx, *grads):
    raise RuntimeError("detections has no gradient")


define_autograd("detections", _backward, lambda ctx, inputs, output: ctx.mark_non_differentiable(*output))
define_autocast("detections", lambda *arguments: _detections(*arguments))  # 16-bit inputs are computed in float32
define_cpu_kernel("detections", cpu.detections)
define_cpu_kernel("detections_by_class", lambda args: cpu.detections(by_class.with_name(args)))
define_triton_kernel(
    "detections", "doublehead.ops.detections.kernel", "detections",
    compiled="detections_by_class", first=by_class.detections,
)  # fmt: skip
