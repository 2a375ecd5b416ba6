"""RoIAlign on one feature map or on all levels of a pyramid: the functions, the operator, its gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import ArgumentValueError, refuse
from .._library import define, define_autocast, define_autograd, one_thread_if_forked
from . import reference
from .arguments import (
    check_features,
    check_output_size,
    check_rois,
    check_scales,
    rois_of_batch,
    rois_of_list,
    to_compute,
)
from .reference import LEVEL_RULES, is_channels_last


def roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """Average RoIAlign: `torchvision.ops.roi_align`, with the same result on valid input.

    Differences: any floating point features with float32 boxes (16-bit boxes are converted before anything is computed;
    float64 features are computed in float64, all others in float32); channels-last features give channels-last
    outputs; the gradient does not depend on the number of threads; a box that is not finite, or under adaptive sampling
    one without area (`aligned`) or more than 2^30 samples a bin long, pools zeros.

    Args:
        input: `Tensor[B, C, H, W]`, float16, bfloat16, float32 or float64.
        boxes: `Tensor[K, 5]` (batch index, x1, y1, x2, y2), or for each image a `Tensor[L, 4]` (x1, y1, x2, y2), in
            image units: `spatial_scale` times a coordinate is one in pixels of `input`.
        output_size: bins, (height, width) or one number for both.
        sampling_ratio: samples a bin along each axis; if <= 0, ceil(box side / bins) of them, per box.
        aligned: shift by half a pixel, so that a pixel's centre has a whole coordinate, and leave boxes as small as
            they are; else sides are taken to be at least 1 pixel.

    Returns:
        `Tensor[K, C, height, width]` in the dtype and memory format of `input`.

    Raises:
        TypeError: a type or dtype is not accepted.
        ValueError: shapes do not fit, devices differ, or an option is out of range.  Both are RuntimeErrors as well,
            and for the shape or type of boxes AssertionErrors, as torchvision's are.
        RuntimeError: a batch index is outside of `input` (on the CPU; elsewhere such a box pools zeros), or, in the
            backward, a gradient of `boxes` is asked for: it is not defined (detach them).

    Source: He et al., Mask R-CNN (2017), section 3; the exact rules are torchvision's.
    """
    check_features((input,), "input")
    rois = boxes if isinstance(boxes, Tensor) else rois_of_list(input, boxes)
    check_rois(rois, input, "boxes", "a Tensor[K, 5] or a list of Tensor[L, 4]")
    size = check_output_size(output_size)
    check_scales((spatial_scale,), 1, "spatial_scale")
    return _pool(
        (input,), to_compute(rois, input), (spatial_scale,), (1.0,), size, sampling_ratio, aligned, 224.0, 4, 0
    )[0]


def multiscale_roi_align(
    features: Sequence[Tensor],
    rois: Tensor,
    output_size: int | Sequence[int],
    *,
    spatial_scales: Sequence[float],
    sampling_ratio: int = 2,
    aligned: bool = False,
    box_scales: Sequence[float] = (1.0,),
    canonical_size: float = 224,
    canonical_level: int = 4,
    level_rule: str = "torchvision",
) -> list[Tensor]:
    """RoIAlign of every box on the pyramid level that suits its size, all levels and images in one call.

    The level comes from the box as given, also where `box_scales` expand it, and depends on `level_rule`: see
    `doublehead.ops.roi_align.reference.box_levels`.  `roi_align` says how a box is pooled on its level.  A box with NaN
    or a negative area has no level and pools zeros, unless there is a single level.  Nothing depends on the data in
    shape, and with a positive `sampling_ratio` nothing is read back from the device.

    Args:
        features: for each level, finest first, a `Tensor[B, C, Hl, Wl]`; one dtype, B and C for all.
        rois: `Tensor[K, 5]` (batch index, x1, y1, x2, y2), or `Tensor[B, R, 4]` boxes, R for each image, then
            K = B * R.  In image pixels.  Padding may hold any box: its output is to be ignored.
        output_size: bins, (height, width) or one number for both.
        spatial_scales: for each level, its pixels per image pixel: 1/4, 1/8, ...  The first one's level has the number
            log2(1 / spatial_scales[0]).
        sampling_ratio, aligned: as in `roi_align`.
        box_scales: factors to expand each box by about its centre; there is one output for each of them.
        canonical_size, canonical_level: a box of this side (pixels) belongs on the level of this number.
        level_rule: "torchvision", "detectron2", "mmdet" or "maskrcnn_benchmark".  The last one also samples boxes only
            up to the coordinate of their last pixel, (x2 - 1, y2 - 1) after they are expanded, as that project does.

    Returns:
        for each of `box_scales` a `Tensor[K, C, height, width]` in the dtype and memory format of the first features.
        Gradients go to `features` alone, to every level.

    Raises:
        TypeError, ValueError, RuntimeError: as in `roi_align`.

    Source: Lin et al., Feature Pyramid Networks (2017), equation 1; Wu et al., Rethinking Classification and
    Localization for Object Detection (2020), for the expanded boxes.
    """
    if not isinstance(features, (list, tuple)):
        refuse("features", features, "a list of a Tensor[B, C, H, W] for each level")
    features = tuple(features)
    check_features(features, "features")
    if isinstance(rois, Tensor) and rois.dim() == 3:
        rois = rois_of_batch(features[0], rois)
    check_rois(rois, features[0], "rois", "a Tensor[K, 5] or Tensor[B, R, 4]")
    size = check_output_size(output_size)
    check_scales(spatial_scales, len(features), "spatial_scales")
    check_scales(box_scales, None, "box_scales")
    if level_rule not in LEVEL_RULES:
        raise ArgumentValueError(f"level_rule must be one of {', '.join(LEVEL_RULES)}, got {level_rule!r}")
    return _pool(
        features, to_compute(rois, features[0]), tuple(spatial_scales), tuple(box_scales), size, sampling_ratio,
        aligned, canonical_size, canonical_level, LEVEL_RULES.index(level_rule),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Registration

_POOLING = (
    "float[] spatial_scales, float[] box_scales, int[] output_size, int sampling_ratio, bool aligned, "
    "float canonical_size, int canonical_level, int level_rule"
)


def _check_images(rois: Tensor, images: int) -> None:
    """The compiled kernel's error, where the reference stands in for it on the CPU."""
    if rois.device.type == "cpu" and rois.shape[0]:
        image = rois[:, 0]
        wrong = ~((image > -1) & (image < images))
        if wrong.any():
            k = int(wrong.nonzero()[0])
            raise RuntimeError(f"roi_align: rois[{k}, 0] is {float(image[k])}, but a batch index must be in "
                               f"[0, {images}), as there are that many images in the features")  # fmt: skip


def _reference(features, rois, *pooling):
    _check_images(rois, features[0].shape[0])
    return reference.multiscale_roi_align(features, rois, *pooling)


def _reference_backward(grads, rois, feature_sizes, *pooling):
    _check_images(rois, feature_sizes[0])
    return reference.multiscale_roi_align_backward(grads, rois, feature_sizes, *pooling)


def _memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _fake(features, rois, spatial_scales, box_scales, output_size, *_):
    first = features[0]
    shape = (rois.shape[0], first.shape[1], *output_size)
    memory_format = _memory_format(is_channels_last(first))
    return [torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=memory_format) for _ in box_scales]


def _fake_backward(grads, rois, feature_sizes, channels_last, *_):
    images, channels, *sides = feature_sizes
    like = {"dtype": grads[0].dtype, "device": grads[0].device, "memory_format": _memory_format(channels_last)}
    return [
        torch.empty((images, channels, height, width), **like)
        for height, width in zip(sides[::2], sides[1::2], strict=True)
    ]


_op = define(
    f"multiscale_roi_align(Tensor[] features, Tensor rois, {_POOLING}) -> Tensor[]", reference=_reference, fake=_fake
)
_op_backward = define(
    "multiscale_roi_align_backward(Tensor[] grads, Tensor rois, SymInt[] feature_sizes, bool channels_last, "
    f"{_POOLING}) -> Tensor[]",
    reference=_reference_backward,
    fake=_fake_backward,
)


# Two ways to the same kernel. Compiled and exported programs hold the operator itself, with the gradient registered for
# it. Eager code steps below autograd first, by hand: that costs microseconds, the registered way some hundred.


def _pool(features: Sequence[Tensor], rois: Tensor, *pooling) -> list[Tensor]:
    if torch.compiler.is_compiling():
        return _op(features, rois, *pooling)
    if torch.is_grad_enabled() and (rois.requires_grad or any(feature.requires_grad for feature in features)):
        function = _PoolTransformed if torch._C._are_functorch_transforms_active() else _Pool
        return list(function.apply(rois, pooling, *features))
    with one_thread_if_forked(), torch._C._AutoDispatchBelowAutograd():
        return _op(features, rois, *pooling)


def _remember(ctx, features: Sequence[Tensor], rois: Tensor, pooling: Sequence) -> None:
    ctx.save_for_backward(rois)
    ctx.feature_sizes = [*features[0].shape[:2], *(side for feature in features for side in feature.shape[2:])]
    ctx.channels_last = is_channels_last(features[0])
    ctx.pooling = pooling


def _feature_grads(ctx, grads: Sequence[Tensor], boxes_need_grad: bool) -> list[Tensor]:
    if boxes_need_grad:
        raise RuntimeError("roi_align: the gradient of the boxes is not defined; pass boxes.detach()")
    (rois,) = ctx.saved_tensors
    return _op_backward(grads, rois, ctx.feature_sizes, ctx.channels_last, *ctx.pooling)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rois, pooling, *features):
        _remember(ctx, features, rois, pooling)
        return _PoolTransformed.forward(rois, pooling, *features)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        with one_thread_if_forked(), torch._C._AutoDispatchBelowAutograd():
            return None, None, *_feature_grads(ctx, grads, ctx.needs_input_grad[0])


class _PoolTransformed(_Pool):
    """For torch.func, which wants the context set up apart; that takes twice the time."""

    @staticmethod
    def forward(rois, pooling, *features):
        with one_thread_if_forked(), torch._C._AutoDispatchBelowAutograd():
            return tuple(_op(features, rois, *pooling))

    @staticmethod
    def setup_context(ctx, inputs, output):
        rois, pooling, *features = inputs
        _remember(ctx, features, rois, pooling)


def _setup_context(ctx, inputs, output):
    features, rois, *pooling = inputs
    _remember(ctx, features, rois, pooling)


def _backward(ctx, grads):
    feature_grads = _feature_grads(ctx, grads, ctx.needs_input_grad[1])
    return feature_grads, None, *(None for _ in ctx.pooling)


def _autocast(features, rois, *pooling):
    """Features keep their dtype (the widest, where the levels' differ), and boxes are never narrowed."""
    dtype = features[0].dtype
    for feature in features[1:]:
        dtype = torch.promote_types(dtype, feature.dtype)
    features = [feature.to(dtype) for feature in features]
    return _op(features, to_compute(rois, features[0]), *pooling)


define_autograd("multiscale_roi_align", _backward, _setup_context)
define_autocast("multiscale_roi_align", _autocast)
