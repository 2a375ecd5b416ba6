"""Translates our operators to ONNX.

Everything except RoIAlign and the suppression itself is plain PyTorch arithmetic, which the exporter supports.  These
two become ONNX operators; intermediate shapes depend on the data there, but inputs and outputs have fixed shapes.

Differences between ONNX's operators and ours:

- RoiAlign needs finite boxes.  Other boxes are not passed to it and pool zeros, as here.
- NonMaxSuppression compares IoUs with the threshold in float32, ours in float64: an IoU that rounds to the threshold
  may be decided differently.  ONNX defines no order for boxes with equal scores; onnxruntime takes the lower index
  first, as here.  ONNX accepts boxes with swapped corners, which have a negative area here, and drops NaN scores, which
  come first here.  A detector produces neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..ops.boxes import clip_boxes, decode_boxes
from ..ops.detections.arguments import DetectionArguments
from ..ops.detections.reference import class_scores, large
from ..ops.roi_align import compatibility
from ..ops.roi_align.pooling import Pooling
from ..ops.roi_align.reference import box_levels, sampled_boxes

LOWEST = torch.finfo(torch.float32).min
"""The score of an empty slot."""

# ---------------------------------------------------------------------------------------------
# The two ONNX operators: shapes for tracing, translations for the exporter

_LIBRARY = torch.library.Library("doublehead_onnx", "DEF")
_LIBRARY.define("nms_mask(Tensor boxes, Tensor scores, float iou_threshold, int max_output) -> Tensor")
_LIBRARY.define(
    "roi_align_some(Tensor into, Tensor selected, Tensor rois, Tensor feature, int[] output_size, float spatial_scale, "
    "int sampling_ratio, bool aligned) -> Tensor"
)
torch.library.register_fake("doublehead_onnx::nms_mask", lambda boxes, scores, *_: torch.empty_like(scores))
torch.library.register_fake("doublehead_onnx::roi_align_some", lambda into, *_: torch.empty_like(into))


def _nms_mask(boxes, scores, iou_threshold: float, max_output: int):
    """`[B, N, 4]`, `[B, G, N]` -> `[B, G, N]`: 1 where a box is kept within its group, else 0."""
    from onnxscript import opset18 as op

    kept = op.NonMaxSuppression(
        boxes, scores, op.Constant(value_ints=[max_output]), op.Constant(value_floats=[iou_threshold]),
        op.Constant(value_floats=[LOWEST / 2]),
    )  # fmt: skip
    ones = op.Expand(op.Constant(value_floats=[1.0]), op.Shape(kept, end=1))
    return op.ScatterND(op.ConstantOfShape(op.Shape(scores)), kept, ones)


def _roi_align_some(
    into, selected, rois, feature, output_size: Sequence[int], spatial_scale: float, sampling_ratio: int, aligned: bool
):
    """`into[K, C, S, S]` with the rows `selected` (bool `[K]`) pooled from `feature`."""
    from onnxscript import opset18 as op

    rows = op.Transpose(op.NonZero(selected), perm=[1, 0])
    rois = op.GatherND(rois, rows)
    image = op.Cast(op.Gather(rois, op.Constant(value_int=0), axis=1), to=7)  # int64
    boxes = op.Slice(rois, op.Constant(value_ints=[1]), op.Constant(value_ints=[5]), op.Constant(value_ints=[1]))
    pooled = op.RoiAlign(
        feature, boxes, image, mode="avg", output_height=output_size[0], output_width=output_size[1],
        sampling_ratio=max(sampling_ratio, 0), spatial_scale=spatial_scale,
        coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
    )  # fmt: skip
    return op.ScatterND(into, rows, pooled)


def translations() -> dict[Callable, Callable]:
    """The translation table for `torch.onnx.export`."""
    operators = torch.ops.doublehead_onnx
    return {operators.nms_mask.default: _nms_mask, operators.roi_align_some.default: _roi_align_some}


# ---------------------------------------------------------------------------------------------
# Our operators, composed of these two and plain PyTorch


def decompositions(levels: int) -> dict[Any, Callable]:
    """The decompositions for `ExportedProgram.run_decompositions`.

    Args:
        levels: the number of the RPN's levels, which are the groups of its suppression.
    """
    ours = torch.ops.doublehead
    return {
        ours.pyramid_roi_align.default: lambda features, rois, *pooling: roi_align(features, rois, Pooling(*pooling)),
        ours.multiscale_roi_align.default: lambda features, rois, *pooling: roi_align(  # of older programs
            features, rois, compatibility.pooling_of(*pooling)
        ),
        ours.detections.default: detections,
        ours.nms_padded.default: lambda *arguments: nms_padded(*arguments[:5], levels),
    }


def roi_align(features: Sequence[Tensor], rois: Tensor, pooling: Pooling) -> list[Tensor]:
    """`doublehead.ops.multiscale_roi_align`: every level pools its own boxes."""
    levels = box_levels(rois[:, 1:], pooling)
    outputs = []
    for box_scale in pooling.box_scales:
        boxes = sampled_boxes(rois[:, 1:], box_scale, pooling.end_offset)
        finite = (boxes.abs() < float("inf")).all(1)
        sampled = torch.cat([rois[:, :1], boxes], 1)
        output = features[0].new_zeros(rois.shape[0], features[0].shape[1], *pooling.output_size)
        for level, (feature, scale) in enumerate(zip(features, pooling.spatial_scales, strict=True)):
            output = torch.ops.doublehead_onnx.roi_align_some(
                output, (levels == level) & finite, sampled, feature, pooling.output_size, scale,
                pooling.sampling_ratio, pooling.aligned,
            )  # fmt: skip
        outputs.append(output)
    return outputs


def nms_padded(boxes, scores, groups, iou_threshold, max_output, number_of_groups):
    """`doublehead.ops.nms_padded` for groups 0 .. `number_of_groups` - 1, which become ONNX's classes."""
    members = groups[:, None] == torch.arange(number_of_groups, device=groups.device)[:, None]
    by_group = torch.where(members, scores[:, None], LOWEST)
    kept = torch.ops.doublehead_onnx.nms_mask(boxes, by_group, iou_threshold, max_output).amax(1) > 0
    best, indices = _best(torch.where(kept, scores, LOWEST), max_output)
    found = best > LOWEST / 2
    return torch.where(found, indices, -1), found.sum(1)


def detections(*arguments):
    """`doublehead.ops.detections`: each class of an image is suppressed as a separate image."""
    args = DetectionArguments(*arguments)
    scores = class_scores(args.logits, args.fusion)[..., 1:]
    batch, rois, classes = scores.shape
    decoded = decode_boxes(args.deltas[:, :, 1:], args.proposals[:, :, None], args.box_weights).flatten(1, 2)
    boxes = clip_boxes(decoded, args.sizes, args.least_side)
    usable = large(boxes, args.min_size) & (decoded.abs() < float("inf")).all(-1)
    candidate = (scores > args.score_threshold) & args.valid[..., None] & usable.view(batch, rois, classes)
    of_class = boxes.view(batch, rois, classes, 4).transpose(1, 2).flatten(0, 1)
    by_class = torch.where(candidate, scores, LOWEST).transpose(1, 2).reshape(batch * classes, 1, rois)
    mask = torch.ops.doublehead_onnx.nms_mask(of_class, by_class, args.nms_iou, args.max_detections)
    kept = mask.view(batch, classes, rois).transpose(1, 2).flatten(1) > 0  # ties: by RoI, then by class
    best, indices = _best(torch.where(kept, scores.flatten(1), LOWEST), args.max_detections)
    found = best > LOWEST / 2
    labels = torch.arange(1, classes + 1, device=boxes.device).repeat(rois)[indices]
    found_boxes = boxes.gather(1, indices[..., None].expand(-1, -1, 4))
    return (
        torch.where(found[..., None], found_boxes, 0.0),
        torch.where(found, best, 0.0),
        torch.where(found, labels, 0),
        found.sum(1),
    )


def _best(scores: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The best `number` scores of each row and their indices; shorter rows are padded."""
    best, indices = scores.topk(min(number, scores.shape[1]), dim=1)
    missing = number - best.shape[1]
    return pad(best, (0, missing), value=LOWEST), pad(indices, (0, missing))
