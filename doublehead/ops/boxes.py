"""Box arithmetic in plain PyTorch: coder, clipping, area, intersection over union.

Boxes are `(x1, y1, x2, y2)` in pixels with continuous coordinates: a box is `x2 - x1` wide, no pixel is added.
Everything is batched, broadcasts over leading dimensions, and has no data-dependent shape and no host sync, so it
compiles, exports and runs on any device.  float16 and bfloat16 are computed in float32, in which areas do not overflow,
and except for `clip_boxes` the result stays float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._checks import ArgumentValueError, check_tensor
from ._dtypes import box_dtype

Weights = Sequence[float]


def box_area(boxes: Tensor) -> Tensor:
    """Area in square pixels; negative where exactly one side is.

    Args:
        boxes: `Tensor[..., 4]`, floating point.

    Returns:
        `Tensor[...]`, float32 or float64.

    Raises:
        TypeError: not a tensor.
        ValueError: the last dimension is not 4.
    """
    _check_last("boxes", boxes, 4)
    x1, y1, x2, y2 = _corners(boxes, box_dtype(boxes))
    return (x2 - x1) * (y2 - y1)


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every box of `a` with every box of `b`.

    Equals `torchvision.ops.box_iou`.  Two boxes without area have no IoU: 0 / 0 is NaN, which no threshold exceeds.

    Args:
        a: `Tensor[..., N, 4]`.
        b: `Tensor[..., M, 4]`; leading dimensions broadcast against those of `a`.

    Returns:
        `Tensor[..., N, M]`, float32 or float64.

    Raises:
        TypeError: not a tensor.
        ValueError: a last dimension is not 4.
    """
    for name, tensor in (("a", a), ("b", b)):
        check_tensor(name, tensor, "a Tensor[..., N, 4]")
        if tensor.dim() < 2:
            raise ArgumentValueError(f"{name} must have shape [..., N, 4], got {list(tensor.shape)}")
    for name, tensor in (("a", a), ("b", b)):
        _check_last(name, tensor, 4)
    dtype = box_dtype(a, b)
    ax1, ay1, ax2, ay2 = _corners(a[..., :, None, :], dtype)
    bx1, by1, bx2, by2 = _corners(b[..., None, :, :], dtype)
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    intersection = width * height
    return intersection / ((ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - intersection)


def encode_boxes(reference: Tensor, proposals: Tensor, weights: Weights = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """The regression target that moves `proposals` onto `reference` (Girshick et al. 2014, equations 6 to 9).

    Centre offsets relative to the proposal's sides, and logarithms of the ratios of the sides, each times its weight.

    Args:
        reference: `Tensor[..., 4]`, the boxes aimed at.
        proposals: `Tensor[..., 4]`, broadcast against `reference`.
        weights: factors of (dx, dy, dw, dh).

    Returns:
        `Tensor[..., 4]` (dx, dy, dw, dh), float32 or float64.  Not finite where a side is not positive.

    Raises:
        TypeError: not a tensor.
        ValueError: a last dimension, or the number of weights, is not 4.
    """
    wx, wy, ww, wh = _four_weights(weights)
    _check_last("reference", reference, 4)
    _check_last("proposals", proposals, 4)
    dtype = box_dtype(reference, proposals)
    px, py, pw, ph = _centre_and_size(proposals, dtype)
    rx, ry, rw, rh = _centre_and_size(reference, dtype)
    return torch.stack(
        (wx * (rx - px) / pw, wy * (ry - py) / ph, ww * torch.log(rw / pw), wh * torch.log(rh / ph)), dim=-1
    )


def decode_boxes(
    deltas: Tensor, boxes: Tensor, weights: Weights = (1.0, 1.0, 1.0, 1.0), clip: float = math.log(1000 / 16)
) -> Tensor:
    """Moves `boxes` by `deltas`: the inverse of `encode_boxes`.

    Args:
        deltas: `Tensor[..., 4]` (dx, dy, dw, dh).
        boxes: `Tensor[..., 4]`, broadcast against `deltas`; with deltas per class, `Tensor[R, C, 4]`, give
            `boxes[:, None]`.
        weights: the factors `deltas` were encoded with.
        clip: upper bound of dw and dh after division by their weights, so that exp cannot overflow.

    Returns:
        `Tensor[..., 4]`, float32 or float64.

    Raises:
        TypeError: not a tensor.
        ValueError: a last dimension, or the number of weights, is not 4.
    """
    wx, wy, ww, wh = _four_weights(weights)
    _check_last("deltas", deltas, 4)
    _check_last("boxes", boxes, 4)
    dtype = box_dtype(deltas, boxes)
    x, y, width, height = _centre_and_size(boxes, dtype)
    dx, dy, dw, dh = _corners(deltas, dtype)
    centre_x, centre_y = dx / wx * width + x, dy / wy * height + y
    half_width = 0.5 * (torch.exp((dw / ww).clamp(max=clip)) * width)
    half_height = 0.5 * (torch.exp((dh / wh).clamp(max=clip)) * height)
    return torch.stack(
        (centre_x - half_width, centre_y - half_height, centre_x + half_width, centre_y + half_height), dim=-1
    )


def clip_boxes(boxes: Tensor, sizes: Tensor, least_side: float = 0.0) -> Tensor:
    """Moves corners outside the image onto its border.

    Args:
        boxes: `Tensor[B, N, 4]`, or any `Tensor[..., N, 4]`.
        sizes: `Tensor[B, 2]` (height, width) in pixels of each image, any real dtype; `Tensor[..., 2]` in general.
        least_side: pixels that remain of a box wholly outside: x1 and y1 stop so far before the far border, x2 and y2
            so far behind the near one.

    Returns:
        `Tensor[B, N, 4]` of `boxes`' dtype.  NaN stays NaN.

    Raises:
        TypeError: not a tensor.
        ValueError: the last dimension of `boxes` is not 4 or that of `sizes` is not 2.
    """
    _check_last("boxes", boxes, 4)
    _check_last("sizes", sizes, 2)
    height, width = sizes.to(boxes.dtype).unbind(-1)
    limits = torch.stack((width, height, width, height), dim=-1)[..., None, :]
    if least_side == 0:
        return torch.minimum(boxes.clamp(min=0), limits)
    low = torch.minimum(boxes[..., :2].clamp(min=0), limits[..., :2] - least_side)
    high = torch.minimum(boxes[..., 2:].clamp(min=least_side), limits[..., 2:])
    return torch.cat((low, high), dim=-1)


def _corners(boxes: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return boxes.to(dtype).unbind(-1)


def _centre_and_size(boxes: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x1, y1, x2, y2 = _corners(boxes, dtype)
    width, height = x2 - x1, y2 - y1
    return x1 + 0.5 * width, y1 + 0.5 * height, width, height


def _check_last(name: str, tensor: Tensor, size: int) -> None:
    check_tensor(name, tensor, f"a Tensor[..., {size}]")
    if tensor.dim() == 0 or tensor.shape[-1] != size:
        raise ArgumentValueError(f"{name} must have shape [..., {size}], got {list(tensor.shape)}")


def _four_weights(weights: Weights) -> Weights:
    if len(weights) != 4:
        raise ValueError(f"weights must be 4 numbers (dx, dy, dw, dh), got {len(weights)}: {weights}")
    return weights
