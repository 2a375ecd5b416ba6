"""RoIAlign's arguments: boxes brought into one form and dtype, and errors that name what is wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import (
    ArgumentTypeError,
    ArgumentValueError,
    AssertedTypeError,
    AssertedValueError,
    check_float,
    check_same_device,
    check_tensor,
    refuse,
)
from .._dtypes import pooling_dtype
from .._library import one_thread_if_forked


def rois_of_list(input: Tensor, boxes: Sequence[Tensor]) -> Tensor:
    """A `Tensor[L, 4]` for each image -> `Tensor[K, 5]`, in the dtype to compute in."""
    if not isinstance(boxes, (list, tuple)):
        if isinstance(boxes, (str, dict)) or hasattr(boxes, "__array__") or not hasattr(boxes, "__iter__"):
            refuse("boxes", boxes, "a list of a Tensor[L, 4] for each image", AssertedTypeError)
        boxes = list(boxes)
    for i, of_image in enumerate(boxes):
        check_tensor(f"boxes[{i}]", of_image, "a Tensor[L, 4]", AssertedTypeError)
        if of_image.dim() != 2 or of_image.shape[1] != 4:
            raise AssertedValueError(f"boxes[{i}] must be a Tensor[L, 4], got {list(of_image.shape)}")
        check_same_device(f"boxes[{i}]", of_image, "the features", input, ArgumentValueError)
    if not boxes:
        return input.new_empty(0, 5, dtype=pooling_dtype(input))
    with one_thread_if_forked():
        rows = [to_compute(of_image, input) for of_image in boxes]
        return torch.cat([torch.cat([of_image.new_full((of_image.shape[0], 1), i), of_image], 1)
                          for i, of_image in enumerate(rows)])  # fmt: skip


def rois_of_batch(feature: Tensor, boxes: Tensor) -> Tensor:
    """`Tensor[B, R, 4]` -> `Tensor[B * R, 5]`, in the dtype to compute in."""
    images, count = boxes.shape[:2]
    if boxes.shape[2] != 4 or images != feature.shape[0]:
        raise ArgumentValueError(
            f"rois must be Tensor[K, 5], or Tensor[B, R, 4] with B = {feature.shape[0]} as in features, "
            f"got {list(boxes.shape)}"
        )
    boxes = to_compute(boxes, feature)
    image = torch.arange(images, dtype=boxes.dtype, device=boxes.device)[:, None, None].expand(images, count, 1)
    return torch.cat([image, boxes], 2).flatten(0, 1)


def to_compute(boxes: Tensor, feature: Tensor) -> Tensor:
    """The boxes in the dtype that pooling from this feature map computes in."""
    dtype = pooling_dtype(feature)
    return boxes if boxes.dtype == dtype else boxes.to(dtype)  # a call that does nothing takes 2 microseconds


def check_features(features: tuple[Tensor, ...], name: str) -> None:
    if not features:
        raise ArgumentValueError(f"{name} must hold at least one level, got none")
    first = features[0]
    _check_feature(first, name if name == "input" else f"{name}[0]")
    shape, device, dtype = first.shape[:2], first.device, first.dtype
    for level, feature in enumerate(features[1:], 1):
        where = f"{name}[{level}]"
        _check_feature(feature, where)
        if feature.shape[:2] != shape or feature.device != device:
            raise ArgumentValueError(
                f"{where} must have the batch size, channels and device of {name}[0], {list(shape)} on {device}, "
                f"got {list(feature.shape[:2])} on {feature.device}"
            )
        if feature.dtype != dtype and not torch.is_autocast_enabled(device.type):
            raise ArgumentTypeError(f"{where} must have the dtype of {name}[0], {dtype}, got {feature.dtype}")


def _check_feature(feature: Tensor, name: str) -> None:
    check_tensor(name, feature, "a Tensor[B, C, H, W]")
    if feature.dim() != 4:
        raise ArgumentValueError(f"{name} must be a Tensor[B, C, H, W], got shape {list(feature.shape)}")
    check_float(name, feature, ArgumentTypeError)


def check_rois(rois: Tensor, feature: Tensor, name: str, accepted: str) -> None:
    asserted = name == "boxes"  # `roi_align`'s
    check_tensor(name, rois, accepted, AssertedTypeError if asserted else ArgumentTypeError)
    if rois.dim() != 2 or rois.shape[1] != 5:
        error = AssertedValueError if asserted else ArgumentValueError
        raise error(f"{name} must be {accepted}, got shape {list(rois.shape)}")
    if not rois.is_floating_point():
        raise ArgumentTypeError(f"{name} must be floating point, got {rois.dtype}")
    check_same_device(name, rois, "the features", feature, ArgumentValueError)


def check_output_size(output_size: int | Sequence[int]) -> tuple[int, int]:
    single = isinstance(output_size, int) or not hasattr(output_size, "__iter__")
    size = (output_size, output_size) if single else tuple(output_size)
    if not all(isinstance(side, int) or hasattr(side, "__index__") for side in size):
        raise ArgumentTypeError(f"output_size must be a whole number or (height, width) of such, got {output_size!r}")
    size = size * 2 if len(size) == 1 else size
    if len(size) != 2 or size[0] < 1 or size[1] < 1:
        raise ArgumentValueError(f"output_size must be a positive number or (height, width) of such, got {output_size}")
    return size


def check_scales(scales: Sequence[float], count: int | None, name: str) -> None:
    if not isinstance(scales, (list, tuple)):
        raise ArgumentTypeError(f"{name} must be a list of numbers, got {type(scales).__name__}")
    if count is not None and len(scales) != count:
        raise ArgumentValueError(f"{name} must hold {count} numbers, one for each level, got {list(scales)}")
    if not scales:
        raise ArgumentValueError(f"{name} must hold at least one number, got none")
    for scale in scales:
        if not isinstance(scale, (float, int)) and not hasattr(scale, "__float__"):
            raise ArgumentTypeError(f"{name} must be positive and finite, got {scale!r}")
        if not 0 < scale < math.inf:
            raise ArgumentValueError(f"{name} must be positive and finite, got {scale}")
