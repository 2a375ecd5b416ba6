"""Tensors without elements: the kernels, their definitions and torchvision agree on what is an answer, and which."""

from __future__ import annotations

import itertools

import pytest
import torch
import torchvision.ops
from torch import Tensor, zeros

from doublehead import ops
from doublehead.ops.detections import reference as detections_reference
from doublehead.ops.detections.arguments import DetectionArguments
from doublehead.ops.fused_conv import reference as fused_conv_reference
from doublehead.ops.fused_conv.arguments import FusedConvArguments
from doublehead.ops.nms import reference as nms_reference
from doublehead.ops.roi_align import op as roi_align
from doublehead.ops.roi_align.level_rules import LEVEL_RULES
from doublehead.ops.roi_align.pooling import Pooling
from doublehead.ops.score_fusion import reference as fusion_reference

OPERATORS = torch.ops.doublehead


def assert_same(actual, expected):
    """In values, shapes, strides and dtypes, of a tensor or of several."""
    actual, expected = ([item] if isinstance(item, Tensor) else list(item) for item in (actual, expected))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, check_stride=True, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_batched_nms_of_nothing_is_nothing_whatever_else_is_given(dtype):
    none = zeros(0, dtype=dtype)
    for boxes in (none, zeros(0, 4), zeros(0, 5), zeros(3, 0, 4)):
        for others in ((none, none, 0.5), (zeros(5), zeros(5), 0.5), (None, None, None)):
            kept = ops.batched_nms(boxes, *others)
            assert_same(kept, torchvision.ops.batched_nms(boxes, *others))
            assert kept.dtype == torch.int64


def test_nms_of_nothing():
    for boxes in (zeros(0), zeros(0, 4), zeros(0).half()):
        assert_same(ops.nms(boxes, zeros(0), 0.5), torch.empty(0, dtype=torch.int64))


def test_nms_of_nothing_compiled():
    def both(boxes, scores):
        return ops.nms(boxes, scores, 0.5), ops.batched_nms(boxes, scores, scores, 0.5)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(both, fullgraph=True, backend="eager", dynamic=True)
        for boxes in (zeros(0), zeros(3, 4), zeros(0, 4)):
            assert_same(compiled(boxes, boxes.sum(-1) if boxes.dim() == 2 else boxes), both(boxes, zeros(len(boxes))))


TORCHVISION = LEVEL_RULES["torchvision"]
POOLING = ([1.0], [1.0], [2, 2], 2, False, 224.0, 4, *TORCHVISION)
SHAPES = [shape for shape in itertools.product((0, 2), (0, 2), (0, 4), (0, 4), (0, 3)) if shape[0] or not shape[4]]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_roi_align_of_nothing(memory_format):
    for *size, count in SHAPES:  # without images there are no RoIs
        maps, rois = torch.rand(size).contiguous(memory_format=memory_format), torch.rand(count, 5)
        pooled = ops.roi_align(maps, rois, 2, sampling_ratio=2)
        assert_same(pooled, roi_align.checked_reference([maps], rois, Pooling(*POOLING)))
        assert_same(pooled.to("meta"), ops.roi_align(maps.to("meta"), rois.to("meta"), 2, sampling_ratio=2))
        if 0 not in size[2:]:  # of no pixels torchvision reads some all the same
            torch.testing.assert_close(pooled, torchvision.ops.roi_align(maps, rois, 2, sampling_ratio=2))
        flat = memory_format is torch.channels_last
        arguments = [torch.rand(count, size[1], 2, 2)], rois, size, flat
        expected = roi_align.checked_reference_backward(*arguments, Pooling(*POOLING))
        assert_same(roi_align.pyramid_roi_align_backward(*arguments, *POOLING), expected)
        maps.requires_grad_()
        ops.roi_align(maps, rois, 2).sum().backward()
        assert maps.grad.shape == maps.shape


def test_suppression_and_detections_of_nothing():
    for batch, number, most in itertools.product((0, 2), (0, 3), (0, 4)):
        boxes = torch.tensor([0.0, 0, 5, 5]).expand(batch, number, 4)
        arguments = boxes, torch.rand(batch, number), zeros(batch, number, dtype=torch.int64), 0.5, most
        assert_same(OPERATORS.nms_padded(*arguments), nms_reference.nms_padded(*arguments))
        for classes in (1, 3):
            logits, valid = torch.rand(batch, number, classes), torch.ones(batch, number, dtype=torch.bool)
            arguments = (
                [logits, logits], zeros(batch, number, classes, 4), boxes, valid, torch.full((batch, 2), 9.0),
                "complementary", 0.01, 0.5, most, 0.01, 0.0, [1.0] * 4,
            )  # fmt: skip
            assert_same(
                OPERATORS.detections(*arguments), detections_reference.detections(DetectionArguments(*arguments))
            )


def test_heads_of_nothing():
    for number, channels, out in itertools.product((0, 2), (0, 3), (0, 4)):
        logits = torch.rand(number, channels)
        for method in ("complementary", "max", "average", "none"):
            assert_same(ops.fuse_scores(logits, logits, method), fusion_reference.fuse_scores(logits, logits, method))
        rows, weight = torch.rand(number * 4, channels), torch.rand(out, channels)
        residual = torch.rand(number * 4, out)
        for mean, sum_with in itertools.product((False, True), (None, residual)):
            arguments = rows, weight, None, None, sum_with, None, [2, 2], True, mean
            assert_same(
                OPERATORS.fused_conv(*arguments), fused_conv_reference.fused_conv(FusedConvArguments(*arguments))
            )


def test_maps_without_cells_or_channels_have_no_statistics_and_no_average():
    with pytest.raises(ValueError, match=r"x must have shape \[M, C\] with M, C > 0, got \[2, 0\]"):
        ops.batch_norm_act(zeros(2, 0), zeros(0), zeros(0))
    with pytest.raises(ValueError, match=r"x must have shape \[N, C, H, W\] with C, H, W > 0, got \[2, 3, 0, 4\]"):
        ops.conv_head(zeros(2, 3, 0, 4), [zeros(3, 3, 3, 3), zeros(3), zeros(4, 6), zeros(4)], [0])
    with pytest.raises(ValueError, match=r"x must have shape \[N \* H \* W, C\] with H, W = size, got .* \[0, 2\]"):
        ops.fused_conv(zeros(4, 3), zeros(3, 3), size=(0, 2))
