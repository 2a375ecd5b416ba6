"""Operators on boxes and features.  They need torch alone.

`roi_align`, `MultiScaleRoIAlign`, `nms` and `batched_nms` take torchvision's arguments and give torchvision's results.
`non_local`, `batch_norm_act`, `fused_conv` and `conv_head` are what a conv-head is made of, `fuse_scores` and
`detections` what follows the heads; `image_batch` is what comes before them all.
"""

from . import _library
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
