"""Operators on boxes and features.  They need torch alone.

`roi_align`, `MultiScaleRoIAlign`, `nms` and `batched_nms` take torchvision's arguments and give torchvision's results.
A conv-head consists of `non_local`, `batch_norm_act`, `fused_conv` and `conv_head`; `fuse_scores` and `detections`
follow the heads; `image_batch` prepares the network's input.
"""

from . import _library
from . import winograd as _winograd  # noqa: F401  (its operator is for the models, and no function of this package)
from .batch_norm import batch_norm_act
from .boxes import box_area, box_iou, clip_boxes, decode_boxes, encode_boxes
from .conv_head import conv_head
from .detections import detections
from .fused_conv import fused_conv
from .image_batch import image_batch
from .nms import batched_nms, nms, nms_padded
from .non_local import BatchNorm, NonLocalBlock, non_local
from .roi_align import AddedTo, LevelRule, MultiScaleRoIAlign, multiscale_roi_align, roi_align
from .score_fusion import fuse_scores

_library.define_missing_kernels()
_library.check_compiled_parts()

__all__ = [
    "AddedTo",
    "BatchNorm",
    "LevelRule",
    "MultiScaleRoIAlign",
    "NonLocalBlock",
    "batch_norm_act",
    "batched_nms",
    "box_area",
    "box_iou",
    "clip_boxes",
    "conv_head",
    "decode_boxes",
    "detections",
    "encode_boxes",
    "fuse_scores",
    "fused_conv",
    "image_batch",
    "multiscale_roi_align",
    "nms",
    "nms_padded",
    "non_local",
    "roi_align",
]
