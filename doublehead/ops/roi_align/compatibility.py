"""`doublehead::multiscale_roi_align` and its backward, as programs exported by doublehead 1 hold them.

Their last argument is the number of a project's level rule.  They forward to `pyramid_roi_align`, whose kernels,
gradient and shapes they share, so that such programs run as they did; nothing exports them any more.
"""

from __future__ import annotations

from torch import Tensor

from .._library import define_composite
from .level_rules import LEVEL_RULES
from .op import pyramid_roi_align, pyramid_roi_align_backward

_RULES = tuple(LEVEL_RULES[name] for name in ("torchvision", "detectron2", "mmdet", "maskrcnn_benchmark"))
_POOLING = (
    "float[] spatial_scales, float[] box_scales, int[] output_size, int sampling_ratio, bool aligned, "
    "float canonical_size, int canonical_level, int level_rule"
)


def _forward(features, rois, *pooling) -> list[Tensor]:
    *pooling, level_rule = pooling
    return pyramid_roi_align(features, rois, *pooling, *_RULES[level_rule])


def _backward(grads, rois, feature_sizes, channels_last, *pooling) -> list[Tensor]:
    *pooling, level_rule = pooling
    return pyramid_roi_align_backward(grads, rois, feature_sizes, channels_last, *pooling, *_RULES[level_rule])


define_composite(f"multiscale_roi_align(Tensor[] features, Tensor rois, {_POOLING}) -> Tensor[]", _forward)
define_composite(
    "multiscale_roi_align_backward(Tensor[] grads, Tensor rois, SymInt[] feature_sizes, bool channels_last, "
    f"{_POOLING}) -> Tensor[]",
    _backward,
)
