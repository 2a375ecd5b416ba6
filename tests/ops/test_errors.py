"""Wrong arguments of the operators: torchvision's kind of error and Python's, and what is said of arrays and lists."""

# ruff: noqa: B008 - the defaults below are arguments that are right, and nothing writes to them
from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
import torchvision.ops
from torch import zeros

from doublehead import ops
from doublehead.ops import _checks

# ---------------------------------------------------------------------------------------------
# The operators that stand in for torchvision's

BOXES, SCORES, GROUPS = torch.tensor([[0.0, 0, 9, 9]] * 5), torch.rand(5), zeros(5)
MAPS, ROIS = torch.rand(2, 3, 8, 8), torch.tensor([[0, 1.0, 1, 5, 5]])
LEVELS, LIST, SIZES = {"0": MAPS, "1": MAPS[..., ::2, ::2]}, [zeros(1, 4)] * 2, [(32, 32)] * 2


def pool(library, x=LEVELS, boxes=LIST, sizes=SIZES, output_size=2, ratio=2):
    return library.MultiScaleRoIAlign(["0", "1"], output_size, ratio)(x, boxes, sizes)


# What torchvision calls an error for want of an attribute, an index or a finite number is no decision of its own: there
# the kind is ours.
WRONG = {
    "flat boxes": (lambda o: o.nms(zeros(4), zeros(3), 0.5), ValueError, "boxes must have shape"),
    "five columns": (lambda o: o.nms(zeros(3, 5), zeros(3), 0.5), ValueError, "boxes must have shape"),
    "a batch": (lambda o: o.nms(zeros(1, 3, 4), zeros(3), 0.5), ValueError, "boxes must have shape"),
    "two scores a box": (lambda o: o.nms(BOXES, zeros(5, 2), 0.5), ValueError, "scores must have shape"),
    "too few scores": (lambda o: o.nms(BOXES, zeros(4), 0.5), ValueError, "scores must have shape"),
    "scores of nothing": (lambda o: o.nms(zeros(0), SCORES, 0.5), ValueError, "scores must have shape"),
    "integers": (lambda o: o.nms(BOXES.int(), SCORES.int(), 0.5), TypeError, "boxes must be float16"),
    "integer scores": (lambda o: o.nms(BOXES, SCORES.int(), 0.5), TypeError, "scores must be float16"),
    "a list of scores": (lambda o: o.nms(BOXES, [0.5] * 5, 0.5), TypeError, "scores must be a Tensor.N., got list"),
    "an array": (lambda o: o.nms(BOXES.numpy(), SCORES, 0.5), TypeError, "boxes must be a Tensor.N, 4., got ndarray"),
    "no threshold": (lambda o: o.nms(BOXES, SCORES, None), RuntimeError, "iou_threshold"),
    "batched: columns": (lambda o: o.batched_nms(zeros(5, 5), SCORES, GROUPS, 0.5), ValueError, "boxes must have"),
    "batched: scores": (lambda o: o.batched_nms(BOXES, SCORES[:4], GROUPS, 0.5), ValueError, "scores must have"),
    "batched: groups": (lambda o: o.batched_nms(BOXES, SCORES, GROUPS[:4], 0.5), ValueError, "idxs must have shape"),
    "batched: flat list": (lambda o: o.batched_nms(BOXES, SCORES, [0] * 5, 0.5), TypeError, "idxs must be a Tensor"),
    "batched: None": (lambda o: o.batched_nms(None, SCORES, GROUPS, 0.5), TypeError, "4., got NoneType$"),
    "four columns": (lambda o: o.roi_align(MAPS, ROIS[:, 1:], 2), ValueError, "boxes must be a Tensor.K, 5."),
    "no boxes of four": (lambda o: o.roi_align(MAPS, zeros(0, 4), 2), ValueError, "boxes must be a Tensor.K, 5."),
    "flat RoIs": (lambda o: o.roi_align(MAPS, zeros(5), 2), ValueError, "boxes must be a Tensor.K, 5."),
    "list of five": (lambda o: o.roi_align(MAPS, [ROIS], 2), ValueError, r"boxes\[0\] must be a Tensor\[L, 4\]"),
    "list of flat": (lambda o: o.roi_align(MAPS, [zeros(0)], 2), ValueError, r"boxes\[0\] must be .* got \[0\]"),
    "list of arrays": (lambda o: o.roi_align(MAPS, [np.zeros((1, 4))], 2), TypeError, r"boxes\[0\] .* got ndarray"),
    "RoIs None": (lambda o: o.roi_align(MAPS, None, 2), TypeError, "boxes must be a list .* got NoneType$"),
    "RoIs a number": (lambda o: o.roi_align(MAPS, 3, 2), TypeError, "boxes must be a list .* got int$"),
    "RoIs a string": (lambda o: o.roi_align(MAPS, "rois", 2), TypeError, "boxes must be a list .* got str$"),
    "RoIs an array": (lambda o: o.roi_align(MAPS, ROIS.numpy(), 2), TypeError, "boxes .* got ndarray; torch.as_tensor"),
    "integer RoIs": (lambda o: o.roi_align(MAPS, ROIS.int(), 2), TypeError, "boxes must be floating point"),
    "a flat map": (lambda o: o.roi_align(MAPS[0], ROIS, 2), ValueError, "input must be a Tensor.B, C, H, W."),
    "integer maps": (lambda o: o.roi_align(MAPS.int(), ROIS.int(), 2), TypeError, "input must be float16"),
    "a list of maps": (lambda o: o.roi_align([MAPS], ROIS, 2), TypeError, "input must be a Tensor.* got list"),
    "negative bins": (lambda o: o.roi_align(MAPS, ROIS, -1), ValueError, "output_size must be a positive number"),
    "half a bin": (lambda o: o.roi_align(MAPS, ROIS, 2.5), TypeError, "output_size must be a whole number .* got 2.5"),
    "half bins": (lambda o: o.roi_align(MAPS, ROIS, (2, 0.5)), TypeError, "output_size must be a whole number"),
    "bins None": (lambda o: o.roi_align(MAPS, ROIS, None), TypeError, "output_size must be .* got None"),
    "bins a string": (lambda o: o.roi_align(MAPS, ROIS, "77"), TypeError, "output_size must be .* got '77'"),
    "scale None": (lambda o: o.roi_align(MAPS, ROIS, 2, None), TypeError, "spatial_scale must be positive .* got None"),
    "scale a string": (lambda o: o.roi_align(MAPS, ROIS, 2, "1"), TypeError, "spatial_scale must be .* got '1'"),
    "ratio a string": (lambda o: o.roi_align(MAPS, ROIS, 2, 1.0, "2"), RuntimeError, "sampling_ratio"),
    "no level": (lambda o: pool(o, x={"p": MAPS}), ValueError, "x must have entries of featmap_names"),
    "levels as a list": (lambda o: pool(o, x=[MAPS]), TypeError, "x must be a dict .* got list"),
    "no sizes": (lambda o: pool(o, sizes=[]), ValueError, "image_shapes must hold at least one"),
    "one tensor": (lambda o: pool(o, boxes=BOXES), TypeError, "boxes must be a list of a Tensor.L, 4. .* got Tensor$"),
    "boxes None": (lambda o: pool(o, boxes=None), TypeError, "boxes must be a list .* got NoneType$"),
    "boxes of five": (lambda o: pool(o, boxes=[zeros(1, 5)] * 2), ValueError, r"boxes\[0\] must be a Tensor"),
    "flat levels": (lambda o: pool(o, x={"0": MAPS[0], "1": MAPS[0]}), ValueError, r"features\[0\] must be"),
    "other channels": (lambda o: pool(o, x=LEVELS | {"1": MAPS[:, :2]}), ValueError, r"features\[1\] must have"),
    "other dtype": (lambda o: pool(o, x=LEVELS | {"1": MAPS.double()}), TypeError, r"features\[1\] must have"),
    "no pixels": (lambda o: pool(o, x=LEVELS | {"0": MAPS[:, :, :0]}), ValueError, "x must have features of at least"),
    "bins of three": (lambda o: pool(o, output_size=(1, 2, 3)), ValueError, "output_size must be a positive number"),
    "a flat area": (lambda o: o.box_area(zeros(0)), ValueError, "boxes must have shape .*, 4., got .0."),
    "flat overlaps": (lambda o: o.box_iou(zeros(0), BOXES), ValueError, "a must have shape .*, N, 4., got .0."),
    "overlaps of five": (lambda o: o.box_iou(BOXES, zeros(5, 5)), ValueError, "b must have shape .*, 4., got .5, 5."),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_torchvisions_kind_of_error_and_pythons(name):
    call, kind, message = WRONG[name]
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        call(torchvision.ops)
    with pytest.raises(kind, match=message) as ours:
        call(ops)
    expected = next(k for k in (RuntimeError, AssertionError, TypeError, ValueError, Exception)
                    if issubclass(theirs.type, k))  # fmt: skip
    assert isinstance(ours.value, expected), f"torchvision: {theirs.value!r}"
    assert isinstance(ours.value, RuntimeError)
    assert "\n" not in str(ours.value) or kind is RuntimeError  # of the argument's schema, PyTorch says more


@pytest.mark.parametrize("name", ["ArgumentValueError", "ArgumentTypeError", "AssertedValueError", "AssertedTypeError"])
def test_the_errors_travel_between_processes(name):
    kind = getattr(_checks, name)
    again = pickle.loads(pickle.dumps(kind("boxes must be otherwise")))
    assert type(again) is kind
    assert str(again) == "boxes must be otherwise"


# ---------------------------------------------------------------------------------------------
# Arrays and lists, in every place of a tensor

ROWS, WEIGHT, LOGITS = zeros(4, 3), zeros(3, 3), zeros(1, 2, 3)
CALLS = {
    "nms": (lambda boxes=BOXES, scores=SCORES: ops.nms(boxes, scores, 0.5)),
    "batched_nms": (lambda boxes=BOXES, scores=SCORES, idxs=GROUPS: ops.batched_nms(boxes, scores, idxs, 0.5)),
    "nms_padded": (
        lambda boxes=BOXES[None], scores=SCORES[None], groups=GROUPS[None].long(): ops.nms_padded(
            boxes, scores, groups, 0.5, 3
        )
    ),
    "roi_align": (lambda input=MAPS, boxes=ROIS: ops.roi_align(input, boxes, 2)),
    "multiscale_roi_align": (
        lambda features=MAPS, rois=ROIS: ops.multiscale_roi_align([features], rois, 2, spatial_scales=[1.0])
    ),
    "box_area": (lambda boxes=BOXES: ops.box_area(boxes)),
    "box_iou": (lambda a=BOXES, b=BOXES: ops.box_iou(a, b)),
    "encode_boxes": (lambda reference=BOXES, proposals=BOXES: ops.encode_boxes(reference, proposals)),
    "decode_boxes": (lambda deltas=BOXES, boxes=BOXES: ops.decode_boxes(deltas, boxes)),
    "clip_boxes": (lambda boxes=BOXES[None], sizes=zeros(1, 2): ops.clip_boxes(boxes, sizes)),
    "fuse_scores": (lambda fc_logits=ROWS, conv_logits=ROWS: ops.fuse_scores(fc_logits, conv_logits)),
    "detections": (
        lambda logits=LOGITS, deltas=zeros(1, 2, 3, 4), proposals=zeros(1, 2, 4), valid=zeros(1, 2).bool(),
               sizes=zeros(1, 2): ops.detections([logits], deltas, proposals, valid, sizes)
    ),
    "image_batch": (
        lambda images=MAPS[0]: ops.image_batch([images], [(8, 8)], (8, 8), [0.5] * 3, [1.0] * 3)
    ),
    "batch_norm_act": (
        lambda x=ROWS, weight=zeros(3), bias=zeros(3), residual=ROWS: ops.batch_norm_act(x, weight, bias, residual)
    ),
    "fused_conv": (
        lambda x=ROWS, weight=WEIGHT, bias=zeros(3), residual=ROWS: ops.fused_conv(
            x, weight, bias, size=(2, 2), residual=residual
        )
    ),
    "conv_head": (lambda x=MAPS: ops.conv_head(x, [zeros(3, 3, 3, 3), zeros(3), zeros(4, 6), zeros(4)], [0])),
    "non_local": (
        lambda x=MAPS, qkv_weight=zeros(9, 3), out_weight=WEIGHT: ops.non_local(x, qkv_weight, None, out_weight, None)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_arrays_and_lists_are_refused_by_name(name):
    call = CALLS[name]
    call()
    for argument, tensor in zip(call.__code__.co_varnames, call.__defaults__, strict=True):
        for wrong in (tensor.numpy(), tensor.tolist()):
            with pytest.raises(TypeError, match=rf"^{argument}\W.*must be .*got (ndarray|list); torch.as_tensor conv"):
                call(**{argument: wrong})
        with pytest.raises(TypeError, match=rf"^{argument}\W.*must be .*got object$"):
            call(**{argument: object()})


def test_tensors_in_place_of_lists():
    with pytest.raises(TypeError, match=r"^features must be a list of a Tensor\[B, C, H, W\] for .*, got Tensor$"):
        ops.multiscale_roi_align(MAPS, ROIS, 2, spatial_scales=[1.0])
    with pytest.raises(TypeError, match="^spatial_scales must be a list of numbers, got float$"):
        ops.multiscale_roi_align([MAPS], ROIS, 2, spatial_scales=0.5)
    with pytest.raises(TypeError, match=r"^logits must be a list of 1 or 2 Tensor\[B, R, C\], got Tensor$"):
        ops.detections(LOGITS, zeros(1, 2, 3, 4), zeros(1, 2, 4), zeros(1, 2).bool(), zeros(1, 2))
