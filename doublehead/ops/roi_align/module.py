"""`MultiScaleRoIAlign`: torchvision's module on the fused operator."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from .._checks import ArgumentTypeError, ArgumentValueError
from .arguments import rois_of_list
from .op import multiscale_roi_align


class MultiScaleRoIAlign(nn.Module):
    """RoIAlign on a feature pyramid: `torchvision.ops.MultiScaleRoIAlign`, with the same result on valid input.

    Differences: all levels in one call, without reading anything back from the device; levels' scales come from the
    image's longer side, so that a very oblong image, a few pixels high, does not mislead (torchvision looks at the
    height alone), and from each call's image sizes, not from the first call's; a box whose level lies beyond the last
    one given is pooled from the last (torchvision leaves zeros if levels are skipped); see also `roi_align`.

    Args:
        featmap_names: the entries of the dict of features to pool from, finest first.
        output_size: bins, (height, width) or one number for both.
        sampling_ratio: samples a bin along each axis; if <= 0, ceil(box side / bins) of them, per box.
        canonical_scale: a box of this side (image pixels) belongs on the level `canonical_level`.
        canonical_level: that level's number; level l has 2^l image pixels a cell.
    """

    def __init__(
        self,
        featmap_names: list[str],
        output_size: int | Sequence[int],
        sampling_ratio: int,
        *,
        canonical_scale: int = 224,
        canonical_level: int = 4,
    ):
        super().__init__()
        self.featmap_names = featmap_names
        self.output_size = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
        self.sampling_ratio = sampling_ratio
        self.canonical_scale = canonical_scale
        self.canonical_level = canonical_level

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """
        Args:
            x: `Tensor[B, C, Hl, Wl]` for each name; others than `featmap_names` are ignored.
            boxes: for each image a `Tensor[L, 4]` (x1, y1, x2, y2), in pixels of the padded batch.
            image_shapes: (height, width) of each image before the backbone and before padding.

        Returns:
            `Tensor[K, C, height, width]`, image after image.

        Raises:
            ValueError: no features or no image shapes; and what `multiscale_roi_align` raises.
        """
        if not hasattr(x, "items"):
            raise ArgumentTypeError(f"x must be a dict of a Tensor[B, C, H, W] for each name, got {type(x).__name__}")
        features = [feature for name, feature in x.items() if name in self.featmap_names]
        if not features:
            raise ArgumentValueError(f"x must have entries of featmap_names {self.featmap_names}, got {list(x)}")
        if not image_shapes:
            raise ArgumentValueError("image_shapes must hold at least one (height, width), got none")
        (pooled,) = multiscale_roi_align(
            features,
            rois_of_list(features[0], boxes),
            self.output_size,
            spatial_scales=[_scale(feature, image_shapes) for feature in features],
            sampling_ratio=self.sampling_ratio,
            canonical_size=self.canonical_scale,
            canonical_level=self.canonical_level,
        )
        return pooled

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(featmap_names={self.featmap_names}, output_size={self.output_size}, "
            f"sampling_ratio={self.sampling_ratio})"
        )


def _scale(feature: Tensor, image_shapes: Sequence[tuple[int, int]]) -> float:
    """The power of two nearest to feature size / image size, by the longer side of the batch."""
    height = max(int(shape[0]) for shape in image_shapes)
    width = max(int(shape[1]) for shape in image_shapes)
    ratio = feature.shape[-2] / height if height >= width else feature.shape[-1] / width
    if ratio == 0:
        raise ArgumentValueError(f"x must have features of at least one pixel, got shape {list(feature.shape)}")
    return 2.0 ** round(math.log2(ratio))
