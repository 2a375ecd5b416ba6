"""RoIAlign in plain PyTorch: the definition, for any device.

The average over a bin's bilinear samples is separable: `out = Ay X Ax^T`, where a row of `Ay` (`Ax`) holds the weights
of the pixel rows (columns) that one row (column) of bins reads.  Both matrices are kept sparse, as pixel indices and
weights; bilinear weights, clamping at the border, samples that do not count and the division by the number of samples
are all in the weights.

Boxes are computed in their own dtype: float64 with float64 features, float32 with all others.  The order of operations
is torchvision's, because the last bit decides which pixels a sample lies between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .pooling import AddedTo, Pooling

_MOST_SAMPLES = 2**30  # per bin and axis; a box of more (some 10^9 pixels long) pools zeros
_CHUNK = 2**25  # elements of the gathered pixels held at a time


def multiscale_roi_align(features: Sequence[Tensor], rois: Tensor, pooling: Pooling) -> list[Tensor]:
    """The operator's definition; see `doublehead.ops.multiscale_roi_align`.  Differentiable in `features`.

    `rois` is `Tensor[K, 5]` in the dtype to compute in.
    """
    channels = features[0].shape[1]
    pixels = torch.cat([feature.permute(0, 2, 3, 1).flatten(0, 2) for feature in features])  # [pixels, C]
    maps = _maps_of_boxes([feature.shape for feature in features], rois, pooling)
    outputs = []
    for box_scale in pooling.box_scales:
        boxes = sampled_boxes(rois[:, 1:], box_scale, pooling.end_offset)
        rows, columns = _taps(boxes, maps, pooling)
        parts = [
            _pool(pixels, _gather_index(maps, rows, columns, part), rows.weights[part], columns.weights[part])
            for part in _chunks(rois.shape[0], rows, columns, channels)
        ]
        output = torch.cat(parts).to(features[0].dtype).permute(0, 3, 1, 2)
        # Not `contiguous`, which leaves the strides of an empty tensor as they are.
        outputs.append(output if is_channels_last(features[0]) else output.clone(memory_format=torch.contiguous_format))
    return outputs


def multiscale_roi_align_backward(
    grads: Sequence[Tensor], rois: Tensor, feature_sizes: Sequence[int], channels_last: bool, pooling: Pooling
) -> list[Tensor]:
    """The gradient of the features: the transpose of the forward, applied to `grads`, one for each box scale.

    `feature_sizes` is (B, C, H0, W0, H1, W1, ...).  Sums are made in the dtype of `rois`.
    """
    images, channels, *sides = feature_sizes
    shapes = [(images, channels, h, w) for h, w in zip(sides[::2], sides[1::2], strict=True)]
    areas = [images * h * w for _, _, h, w in shapes]
    maps = _maps_of_boxes(shapes, rois, pooling)
    pixels = rois.new_zeros(sum(areas), channels)
    for grad, box_scale in zip(grads, pooling.box_scales, strict=True):
        boxes = sampled_boxes(rois[:, 1:], box_scale, pooling.end_offset)
        rows, columns = _taps(boxes, maps, pooling)
        for part in _chunks(rois.shape[0], rows, columns, channels):
            index = _gather_index(maps, rows, columns, part)
            values = torch.einsum(
                "kcpq,kpi,kqj->kpiqjc", grad[part].to(rois.dtype), rows.weights[part], columns.weights[part]
            )
            pixels.index_add_(0, index.flatten(), values.reshape(index.numel(), channels))
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return [
        part.view(b, h, w, c).permute(0, 3, 1, 2).to(grads[0].dtype).clone(memory_format=memory_format)
        for part, (b, c, h, w) in zip(pixels.split(areas), shapes, strict=True)
    ]


def box_levels(boxes: Tensor, pooling: Pooling) -> Tensor:
    """The pyramid level of each box, an index into `pooling.spatial_scales`.

    `AddedTo` has the formulas; the level is clamped to those there are.  The finest one has the number
    log2(1 / spatial_scales[0]).  With one level there is nothing to choose.

    Args:
        boxes: `Tensor[K, 4]` (x1, y1, x2, y2) in image pixels.
        pooling: its scales, canonical size and level, and epsilon are read.

    Returns:
        `Tensor[K]` int64; -1 for a box with NaN or a negative area.
    """
    levels, epsilon, canonical_level = len(pooling.spatial_scales), pooling.level_epsilon, pooling.canonical_level
    if levels == 1:
        return torch.zeros(boxes.shape[0], dtype=torch.int64, device=boxes.device)
    lowest = round(-math.log2(pooling.spatial_scales[0]))
    size = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    if pooling.epsilon_added_to == AddedTo.FINEST_RATIO:
        finest_size = pooling.canonical_size * 2.0 ** (lowest - canonical_level)
        level = (_divide(size, finest_size) + epsilon).log2().floor()
    elif pooling.epsilon_added_to == AddedTo.CANONICAL_RATIO:
        level = (canonical_level + (_divide(size, pooling.canonical_size) + epsilon).log2()).floor() - lowest
    else:
        level = (canonical_level + _divide(size, pooling.canonical_size).log2() + epsilon).floor() - lowest
    level = level.clamp(0, levels - 1)
    return level.where(~size.isnan(), -1).to(torch.int64)


def _divide(numbers: Tensor, divisor: float) -> Tensor:
    """`numbers / divisor`, rounded alike on every device: by a Python number CUDA multiplies with the reciprocal.

    The last bit decides on which side of a level's or a map's edge something lies.
    """
    return numbers / numbers.new_full((), divisor)


def is_channels_last(feature: Tensor) -> bool:
    """Whether outputs follow this feature map into channels-last memory."""
    return feature.stride(1) == 1 and not feature.is_contiguous()


# ---------------------------------------------------------------------------------------------
# One map per box, one weight matrix per axis


class _Maps(NamedTuple):
    """The feature map that each box is pooled from, `Tensor[K]` each."""

    offset: Tensor  # of its first pixel in the table of all pixels
    height: Tensor
    width: Tensor
    scale: Tensor
    exists: Tensor  # bool: the box has a level


class _Taps(NamedTuple):
    """The sparse weight matrices of all boxes along one axis, `Tensor[K, bins, taps]` each."""

    indices: Tensor
    weights: Tensor


def _maps_of_boxes(shapes, rois, pooling: Pooling) -> _Maps:
    levels = box_levels(rois[:, 1:], pooling)
    exists, levels = levels >= 0, levels.clamp(min=0)
    images = shapes[0][0]
    offsets = [0]
    for _, _, height, width in shapes:
        offsets.append(offsets[-1] + images * height * width)

    def of_level(values, dtype=torch.int64) -> Tensor:
        return torch.tensor(list(values), dtype=dtype, device=rois.device)[levels]

    height, width = of_level(s[2] for s in shapes), of_level(s[3] for s in shapes)
    image = rois[:, 0].to(torch.int64)
    inside = (image >= 0) & (image < images)
    offset = of_level(offsets[:-1]) + image.where(inside, 0) * height * width
    return _Maps(offset, height, width, of_level(pooling.spatial_scales, rois.dtype), exists & inside)


def sampled_boxes(boxes: Tensor, factor: float, end_offset: float) -> Tensor:
    """What is sampled: boxes scaled about their centres, less `end_offset` at their ends.

    A factor of 1 and an offset of 0 leave them as they are to the last bit.
    """
    low, high = boxes[:, :2], boxes[:, 2:]
    if factor != 1:
        centre, half = (low + high) * 0.5, (high - low) * 0.5 * factor
        low, high = centre - half, centre + half
    return torch.cat([low, high - end_offset if end_offset else high], 1)


def _taps(boxes, maps: _Maps, pooling: Pooling) -> tuple[_Taps, _Taps]:
    x1, y1, x2, y2 = boxes.unbind(1)
    height, width = pooling.output_size
    return (
        _axis_taps(y1, y2, maps, maps.height, height, pooling.sampling_ratio, pooling.aligned),
        _axis_taps(x1, x2, maps, maps.width, width, pooling.sampling_ratio, pooling.aligned),
    )


def _axis_taps(low, high, maps: _Maps, extent, bins, sampling_ratio, aligned) -> _Taps:
    """The pixels that each bin reads along one axis, two for each sample, and their weights."""
    offset = 0.5 if aligned else 0.0
    start, end = low * maps.scale - offset, high * maps.scale - offset
    length = end - start
    usable = maps.exists & start.isfinite() & end.isfinite() & length.isfinite() & (extent > 0)
    if not aligned:
        length = length.clamp(min=1)
    bin_size = _divide(length, bins)
    start, bin_size = start.where(usable, 0)[:, None, None], bin_size.where(usable, 0)[:, None, None]
    usable, extent = usable[:, None, None], extent[:, None, None]
    bin_start = start + torch.arange(bins, dtype=low.dtype, device=low.device)[:, None] * bin_size

    if sampling_ratio > 0:
        samples = torch.full_like(start, sampling_ratio)
        sample = torch.arange(sampling_ratio, dtype=low.dtype, device=low.device)
    else:  # about one sample for each pixel, at least: those before the map are passed over, so few remain
        samples = bin_size.ceil()
        samples = samples.where((samples > 0) & (samples <= _MOST_SAMPLES), 0)
        step = bin_size / samples.clamp(min=1)
        first = ((-1 - bin_start) / step - 2).floor().clamp(min=0).where(samples > 0, 0)
        most = min(int(samples.max()), 2 * int(extent.max()) + 8) if samples.numel() else 0
        sample = first + torch.arange(most, dtype=low.dtype, device=low.device)

    position = bin_start + (sample + 0.5) * bin_size / samples.clamp(min=1)
    counts = usable & (sample < samples) & (position >= -1) & (position <= extent)
    position = position.where(counts, 0).clamp(min=0)
    last = (extent - 1).clamp(min=0)
    index = torch.minimum(position.to(torch.int64), last)
    fraction = (position - index).where(index < last, 0)
    indices = torch.stack([index, torch.minimum(index + 1, last)], -1)
    weights = torch.stack([1 - fraction, fraction], -1) * (counts / samples.clamp(min=1))[..., None]
    return _Taps(indices.flatten(2), weights.to(low.dtype).flatten(2))


# ---------------------------------------------------------------------------------------------
# Pooling


def _chunks(count: int, rows: _Taps, columns: _Taps, channels: int) -> list[slice]:
    """Ranges of boxes whose gathered pixels are not too many to hold; one empty range if there are no boxes."""
    each = rows.indices.shape[1:].numel() * columns.indices.shape[1:].numel() * channels
    step = max(1, _CHUNK // max(1, each))
    return [slice(begin, begin + step) for begin in range(0, max(1, count), step)]


def _gather_index(maps: _Maps, rows: _Taps, columns: _Taps, part: slice) -> Tensor:
    """Indices, in the table of all pixels, of the pixels that some boxes read: `Tensor[K, PH, taps, PW, taps]`."""
    y, x = rows.indices[part][:, :, :, None, None], columns.indices[part][:, None, None, :, :]
    offset, width, height = (t[part][:, None, None, None, None] for t in (maps.offset, maps.width, maps.height))
    return (offset + y * width + x).where((height > 0) & (width > 0), 0)  # their weights are 0 on an empty map


def _pool(pixels: Tensor, index: Tensor, row_weights: Tensor, column_weights: Tensor) -> Tensor:
    """`Tensor[K, PH, PW, C]`."""
    if pixels.shape[0] == 0:  # every map is empty
        return row_weights.new_zeros(*row_weights.shape[:2], column_weights.shape[1], pixels.shape[1])
    values = pixels[index].to(row_weights.dtype)  # [K, PH, taps, PW, taps, C]
    values = torch.einsum("kpiqjc,kqj->kpiqc", values, column_weights)
    return torch.einsum("kpiqc,kpi->kpqc", values, row_weights)
