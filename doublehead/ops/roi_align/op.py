"""RoIAlign on one feature map or on all levels of a pyramid: the functions, the operator, its gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import refuse
from .._library import (
    below_autograd,
    define,
    define_autocast,
    define_autograd,
    in_functorch_transform,
    one_thread_if_forked,
)
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
from .level_rules import resolve
from .pooling import POOLING_SCHEMA, LevelRule, Pooling
from .reference import is_channels_last


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
            image units.
        output_size: bins, (height, width) or one number for both.
        spatial_scale: pixels of `input` per image unit: 1/16 for a stride of 16.
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
    no_rule = 0.0, 0, 0.0  # with one level there is nothing to choose
    pooling = Pooling((spatial_scale,), (1.0,), size, sampling_ratio, aligned, 224.0, 4, *no_rule)
    return _pool((input,), to_compute(rois, input), pooling)[0]


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
    level_rule: str | LevelRule = "torchvision",
) -> list[Tensor]:
    """RoIAlign of every box on the pyramid level that suits its size, all levels and images in one call.

    The level comes from the box as given, also where `box_scales` expand it.  `roi_align` says how a box is pooled on
    its level.  A box with NaN or a negative area has no level and pools zeros, unless there is a single level.  Nothing
    depends on the data in shape, and with a positive `sampling_ratio` nothing is read back from the device.

    Args:
        features: for each level, finest first, a `Tensor[B, C, Hl, Wl]`; one dtype, B and C for all.
        rois: `Tensor[K, 5]` (batch index, x1, y1, x2, y2), or `Tensor[B, R, 4]` boxes, R for each image, then
            K = B * R.  In image pixels.  Padding may hold any box: its output is to be ignored.
        output_size: bins, (height, width) or one number for both.
        spatial_scales: for each level, its pixels per image pixel: 1/4, 1/8, ...  The first one's level has the number
            log2(1 / spatial_scales[0]).
        sampling_ratio: samples a bin along each axis; if <= 0, ceil(box side / bins) of them, per box.
        aligned: as in `roi_align`.
        box_scales: factors to expand each box by about its centre; there is one output for each of them.
        canonical_size: a box of this side (pixels) belongs on the level `canonical_level`.
        canonical_level: that level's number; level l has 2^l image pixels a cell.
        level_rule: decides next to the border of two levels: a `doublehead.ops.LevelRule`, or the name of the project
            whose rule it is, "torchvision", "detectron2", "mmdet" or "maskrcnn_benchmark".  The last one's also samples
            boxes only up to the coordinate of their last pixel, (x2 - 1, y2 - 1) after they are expanded.

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
    epsilon, added_to, end_offset = resolve(level_rule)
    pooling = Pooling(
        tuple(spatial_scales), tuple(box_scales), size, sampling_ratio, aligned, canonical_size, canonical_level,
        epsilon, int(added_to), end_offset,  # the dispatcher is slow to read an enum
    )  # fmt: skip
    return _pool(features, to_compute(rois, features[0]), pooling)


# ---------------------------------------------------------------------------------------------
# Registration


def _check_images(rois: Tensor, images: int) -> None:
    """The compiled kernel's error, where the reference stands in for it on the CPU."""
    if rois.device.type == "cpu" and rois.shape[0]:
        image = rois[:, 0]
        wrong = ~((image > -1) & (image < images))
        if wrong.any():
            k = int(wrong.nonzero()[0])
            raise RuntimeError(f"roi_align: rois[{k}, 0] is {float(image[k])}, but a batch index must be in "
                               f"[0, {images}), as there are that many images in the features")  # fmt: skip


def _pack(features, rois, *pooling):
    return features, rois, Pooling(*pooling)


def _pack_backward(grads, rois, feature_sizes, channels_last, *pooling):
    return grads, rois, feature_sizes, channels_last, Pooling(*pooling)


def checked_reference(features, rois, pooling: Pooling):
    _check_images(rois, features[0].shape[0])
    return reference.multiscale_roi_align(features, rois, pooling)


def checked_reference_backward(grads, rois, feature_sizes, channels_last, pooling: Pooling):
    _check_images(rois, feature_sizes[0])
    return reference.multiscale_roi_align_backward(grads, rois, feature_sizes, channels_last, pooling)


def _memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _fake(features, rois, pooling: Pooling):
    first = features[0]
    shape = (rois.shape[0], first.shape[1], *pooling.output_size)
    like = {"dtype": first.dtype, "device": first.device, "memory_format": _memory_format(is_channels_last(first))}
    return [torch.empty(shape, **like) for _ in pooling.box_scales]


def _fake_backward(grads, rois, feature_sizes, channels_last, pooling: Pooling):
    images, channels, *sides = feature_sizes
    like = {"dtype": grads[0].dtype, "device": grads[0].device, "memory_format": _memory_format(channels_last)}
    return [
        torch.empty((images, channels, height, width), **like)
        for height, width in zip(sides[::2], sides[1::2], strict=True)
    ]


pyramid_roi_align = define(
    f"pyramid_roi_align(Tensor[] features, Tensor rois, {POOLING_SCHEMA}) -> Tensor[]",
    reference=checked_reference,
    fake=_fake,
    pack=_pack,
)
pyramid_roi_align_backward = define(
    "pyramid_roi_align_backward(Tensor[] grads, Tensor rois, SymInt[] feature_sizes, bool channels_last, "
    f"{POOLING_SCHEMA}) -> Tensor[]",
    reference=checked_reference_backward,
    fake=_fake_backward,
    pack=_pack_backward,
)


# Two ways to the same kernel. Compiled and exported programs hold the operator itself, with the gradient registered for
# it. Eager code steps below autograd first, by hand: that costs microseconds, the registered way some hundred.


def _pool(features: Sequence[Tensor], rois: Tensor, pooling: Pooling) -> list[Tensor]:
    if torch.compiler.is_compiling():
        return pyramid_roi_align(features, rois, *pooling)
    if torch.is_grad_enabled() and (rois.requires_grad or any(feature.requires_grad for feature in features)):
        function = _PoolTransformed if in_functorch_transform() else _Pool
        return list(function.apply(rois, pooling, *features))
    with one_thread_if_forked(), below_autograd():
        return pyramid_roi_align(features, rois, *pooling)


def _remember(ctx, features: Sequence[Tensor], rois: Tensor, pooling: Pooling) -> None:
    ctx.save_for_backward(rois)
    ctx.feature_sizes = [*features[0].shape[:2], *(side for feature in features for side in feature.shape[2:])]
    ctx.channels_last = is_channels_last(features[0])
    ctx.pooling = pooling


def _feature_grads(ctx, grads: Sequence[Tensor], boxes_need_grad: bool) -> list[Tensor]:
    if boxes_need_grad:
        raise RuntimeError("roi_align: the gradient of the boxes is not defined; pass boxes.detach()")
    (rois,) = ctx.saved_tensors
    return pyramid_roi_align_backward(grads, rois, ctx.feature_sizes, ctx.channels_last, *ctx.pooling)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rois, pooling, *features):
        _remember(ctx, features, rois, pooling)
        return _PoolTransformed.forward(rois, pooling, *features)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        with one_thread_if_forked(), below_autograd():
            return None, None, *_feature_grads(ctx, grads, ctx.needs_input_grad[0])


class _PoolTransformed(_Pool):
    """For torch.func, which wants the context set up apart; that takes twice the time."""

    @staticmethod
    def forward(rois, pooling, *features):
        with one_thread_if_forked(), below_autograd():
            return tuple(pyramid_roi_align(features, rois, *pooling))

    @staticmethod
    def setup_context(ctx, inputs, output):
        rois, pooling, *features = inputs
        _remember(ctx, features, rois, pooling)


def _setup_context(ctx, inputs, output):
    _remember(ctx, *_pack(*inputs))


def _backward(ctx, grads):
    feature_grads = _feature_grads(ctx, grads, ctx.needs_input_grad[1])
    return feature_grads, None, *(None for _ in ctx.pooling)


def _autocast(features, rois, *pooling):
    """Features keep their dtype (the widest, where the levels' differ), and boxes are never narrowed."""
    dtype = features[0].dtype
    for feature in features[1:]:
        dtype = torch.promote_types(dtype, feature.dtype)
    features = [feature.to(dtype) for feature in features]
    return pyramid_roi_align(features, to_compute(rois, features[0]), *pooling)


define_autograd("pyramid_roi_align", _backward, _setup_context)
define_autocast("pyramid_roi_align", _autocast)
