"""Anchors: the boxes that the region proposal network starts from (Ren et al. 2015; one size a pyramid level).

Projects round differently, and weights trained with one way want that way:

- `rounded` (torchvision): corners rounded to whole pixels, centres on cells' corners; a level's stride is the padded
  image's side // cells, slightly under 64 on P6 where P5's side is odd;
- `exact` (Detectron2, MMDetection): nothing is rounded, strides are 4, 8, ...;
- `legacy` (maskrcnn-benchmark): boxes of a cell's area are rounded for each aspect ratio and then enlarged; centres lie
  in the middle of the cell; strides are 4, 8, ...  Its boxes end at their last pixel: here they end one pixel further.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..config import RPNConfig


class Anchors(nn.Module):
    """Anchors of every map.

    Args:
        config: sizes, aspect ratios and the way to round.
        strides: pixels per cell of each map.

    Raises:
        ValueError: neither one size for each map nor a single map, or an unknown way to round.
    """

    def __init__(self, config: RPNConfig, strides: Sequence[int]) -> None:
        super().__init__()
        sizes, levels = config.anchor_sizes, len(strides)
        if levels not in (1, len(sizes)):
            raise ValueError(f"rpn.anchor_sizes: expected one for each of {levels} levels, got {len(sizes)}")
        if config.anchors not in CELL_ANCHORS:
            raise ValueError(f"rpn.anchors: expected one of {', '.join(CELL_ANCHORS)}, got {config.anchors!r}")
        if config.anchors == "legacy" and levels == 1:
            raise ValueError("rpn.anchors: 'legacy' anchors need a pyramid, backbone.neck 'fpn'")
        self.strides = tuple(strides)
        self.per_image = config.anchors == "rounded"
        strides_of_sizes = self.strides * len(sizes) if levels == 1 else self.strides
        cells = [
            CELL_ANCHORS[config.anchors](size, config.aspect_ratios, stride)
            for size, stride in zip(sizes, strides_of_sizes, strict=True)
        ]
        self.register_buffer("cells", torch.stack(cells).view(levels, -1, 4), persistent=False)

    @property
    def per_cell(self) -> int:
        """How many anchors each cell has."""
        return self.cells.shape[1]

    def forward(self, features: Sequence[Tensor], image_size: Sequence[int]) -> list[Tensor]:
        """Anchors of each map `Tensor[B, C, H, W]`: `Tensor[H * W * A, 4]`, in pixels of the padded image.

        `image_size`: (height, width) of that image.
        """
        return [self._level_anchors(level, feature.shape[-2:], image_size) for level, feature in enumerate(features)]

    def _level_anchors(self, level: int, cells: Sequence[int], image_size: Sequence[int]) -> Tensor:
        if self.per_image:
            stride_y, stride_x = image_size[0] // cells[0], image_size[1] // cells[1]
        else:
            stride_y = stride_x = self.strides[level]
        y = torch.arange(cells[0], device=self.cells.device, dtype=torch.float32) * stride_y
        x = torch.arange(cells[1], device=self.cells.device, dtype=torch.float32) * stride_x
        shift_y, shift_x = (shift.reshape(-1) for shift in torch.meshgrid(y, x, indexing="ij"))
        shifts = torch.stack([shift_x, shift_y, shift_x, shift_y], dim=1)
        return (shifts[:, None] + self.cells[level]).reshape(-1, 4)


def exact_anchors(size: float, aspect_ratios: Sequence[float], stride: int) -> Tensor:
    """Anchors of the cell at the origin, centred on it: `Tensor[A, 4]`.

    Args:
        size: square root of the area, pixels.
        aspect_ratios: height / width.
        stride: pixels per cell; here it does not matter.
    """
    ratios = torch.tensor(aspect_ratios, dtype=torch.float32)
    height, width = size * ratios.sqrt(), size / ratios.sqrt()
    return torch.stack([-width, -height, width, height], dim=1) / 2


def rounded_anchors(size: float, aspect_ratios: Sequence[float], stride: int) -> Tensor:
    """As `exact_anchors`, with corners on whole pixels."""
    return exact_anchors(size, aspect_ratios, stride).round()


def legacy_anchors(size: float, aspect_ratios: Sequence[float], stride: int) -> Tensor:
    """As `exact_anchors`, but centred in the cell, and as wide and high as rounded parts of a cell, enlarged."""
    ratios = torch.tensor(aspect_ratios, dtype=torch.float64)
    width = (stride / ratios.sqrt()).round()
    height = (width * ratios).round()
    half = torch.stack([width, height], dim=1) * (size / stride / 2)
    return torch.cat([stride / 2 - half, stride / 2 + half], dim=1).float()


def inside_images(anchors: Tensor, sizes: Tensor, straddle: float, last_pixel: bool = False) -> Tensor:
    """Which anchors do not cross the border of an image by more than `straddle` pixels: bool `Tensor[B, N]`.

    Args:
        anchors: `Tensor[N, 4]`, the same for every image.
        sizes: `Tensor[B, 2]`, (height, width) of each image without its padding.
        straddle: pixels, at least 0.
        last_pixel: the rule of maskrcnn-benchmark's boxes, which end at their last pixel, one before ours: that pixel's
            coordinate has to be under width + straddle, or height + straddle.  It matters to anchors that end at
            half a pixel.  False: the box ends at width + straddle at most.
    """
    height, width = (sizes.to(anchors.dtype) + straddle).unsqueeze(-1).unbind(1)  # [B, 1] each
    x1, y1, x2, y2 = anchors.unbind(1)
    starts = (x1 >= -straddle) & (y1 >= -straddle)
    if last_pixel:
        return starts & (x2 - 1 < width) & (y2 - 1 < height)
    return starts & (x2 <= width) & (y2 <= height)


CELL_ANCHORS = {"rounded": rounded_anchors, "exact": exact_anchors, "legacy": legacy_anchors}
"""`RPNConfig.anchors` -> anchors of one cell and size."""
