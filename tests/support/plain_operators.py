"""RoIAlign and NMS by the letter, box by box: the maths of mmcv's and Detectron2's compiled operators."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def plain_roi_align(x: Tensor, rois: Tensor, size: tuple[int, int], scale: float, ratio: int, aligned: bool) -> Tensor:
    """The mean of bilinear samples in each bin: `Tensor[B, C, H, W]`, `Tensor[K, 5]` -> `Tensor[K, C, *size]`."""
    output = x.new_zeros(len(rois), x.shape[1], *size)
    for k, (image, *box) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (value * scale - (0.5 if aligned else 0.0) for value in box)
        width, height = x2 - x1, y2 - y1
        if not aligned:
            width, height = max(width, 1.0), max(height, 1.0)
        rows, columns = (
            samples(start, side, bins, ratio if ratio > 0 else math.ceil(side / bins), limit)
            for start, side, bins, limit in ((y1, height, size[0], x.shape[2]), (x1, width, size[1], x.shape[3]))
        )
        output[k] = torch.einsum("ph,chw,qw->cpq", rows.to(x), x[int(image)], columns.to(x))
    return output


def samples(start: float, side: float, bins: int, number: int, limit: int) -> Tensor:
    """Weights `Tensor[bins, limit]` of the pixels along one axis, averaged over a bin's samples."""
    weights = torch.zeros(bins, limit, dtype=torch.float64)
    for i in range(bins):
        for j in range(number):
            place = start + side / bins * (i + (j + 0.5) / number)
            if -1 <= place <= limit:
                place = min(max(place, 0.0), limit - 1.0)
                low = int(place)
                weights[i, low] += (1 - (place - low)) / number
                weights[i, min(low + 1, limit - 1)] += (place - low) / number
    return weights


def plain_nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Indices of the kept boxes, best first."""
    kept: list[int] = []
    rows = boxes.tolist()
    for i in scores.argsort(descending=True, stable=True).tolist():
        if all(overlap(rows[i], rows[j]) <= threshold for j in kept):
            kept.append(i)
    return torch.tensor(kept, dtype=torch.int64)


def overlap(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union else 0.0


def random_boxes(number: int, extent: tuple[float, float] = (160, 128), seed: int = 0) -> Tensor:
    """`Tensor[number, 4]` that overlap, of sides for every level of a pyramid."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(number, 2, generator=generator) * torch.tensor(extent) * 0.6
    return torch.cat((corner, corner + 2 + torch.rand(number, 2, generator=generator) ** 2 * torch.tensor(extent)), 1)
