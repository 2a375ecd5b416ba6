"""From pyramid and proposals to one fixed-size map per RoI and head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from ..config import RoIConfig
from ..ops import multiscale_roi_align


class RoIPooling(nn.Module):
    """RoIAlign over P2 .. P5 (or C4), for all images, levels and box scales in one call.

    The two heads may look at boxes enlarged by different factors (`fc_box_scale`,
    `conv_box_scale`); the level is chosen from the box as proposed.
    """

    def __init__(self, config: RoIConfig, box_scales: Iterable[float], strides: Sequence[int] = (4, 8, 16, 32)) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.config = config
        self.box_scales = tuple(sorted(set(box_scales)))

    def forward(
        self, features: Sequence[Tensor], boxes: Tensor, box_scales: Sequence[float] | None = None
    ) -> dict[float, Tensor]:
        """Pool every box once per box scale.

        Args:
            features: one per stride (further levels are left out), each `Tensor[B, C, H, W]`.
            boxes: `Tensor[B, R, 4]`, or `Tensor[K, 5]` with the number of the image first.
            box_scales: some of the heads' scales; None: all.

        Returns:
            box scale -> `Tensor[B * R, C, output_size, output_size]`, or `Tensor[K, ...]`.
        """
        size = self.config.output_size
        box_scales = self.box_scales if box_scales is None else tuple(box_scales)
        pooled = multiscale_roi_align(
            list(features[: len(self.strides)]),
            boxes,
            (size, size),
            spatial_scales=[1 / stride for stride in self.strides],
            sampling_ratio=self.config.sampling_ratio,
            aligned=self.config.aligned,
            box_scales=box_scales,
            canonical_size=self.config.canonical_size,
            level_rule=self.config.level_rule,
        )
        return dict(zip(box_scales, pooled, strict=True))
