"""`doublehead::multiscale_roi_align` and its backward, which older exported programs hold.

Their last argument is the number of a project's level rule.  They forward to `pyramid_roi_align` and its backward,
whose kernels, gradient and shapes they share, so such programs run as they did.  Nothing exports them any more.
"""

from __future__ import annotations

from torch import Tensor

from .._library import define_composite
from .level_rules import LEVEL_RULES
from .op import pyramid_roi_align, pyramid_roi_align_backward
from .pooling import Pooling

_RULES = tuple(LEVEL_RULES[name] for name in ("torchvision", "detectron2", "mmdet", "maskrcnn_benchmark"))
_POOLING = (
    "float[] spatial_scales, float[] box_scales, int[] output_size, int sampling_ratio, bool aligned, "
    "float canonical_size, int canonical_level, int level_rule"
)


def pooling_of(*arguments) -> Pooling:
    """The arguments after the tensors, the number of a level rule last, as they are today."""
    *pooling, level_rule = arguments
    return Pooling(*pooling, *_RULES[level_rule])


def _forward(features, rois, *pooling) -> list[Tensor]:
    return pyramid_roi_align(features, rois, *pooling_of(*pooling))


def _backward(grads, rois, feature_sizes, channels_last, *pooling) -> list[Tensor]:
    return pyramid_roi_align_backward(grads, rois, feature_sizes, channels_last, *pooling_of(*pooling))


define_composite(f"multiscale_roi_align(Tensor[] features, Tensor rois, {_POOLING}) -> Tensor[]", _forward)
define_composite(
    "multiscale_roi_align_backward(Tensor[] grads, Tensor rois, SymInt[] feature_sizes, bool channels_last, "
    f"{_POOLING}) -> Tensor[]",
    _backward,
)
