"""Operators on boxes and features.  They need torch alone.

`roi_align`, `MultiScaleRoIAlign`, `nms` and `batched_nms` take torchvision's arguments and give torchvision's results.
"""

from .batch_norm import batch_norm_act
from .boxes import box_area, box_iou, clip_boxes, decode_boxes, encode_boxes
from .fused_conv import fused_conv
from .nms import batched_nms, nms, nms_padded
from .non_local import BatchNorm, NonLocalBlock, non_local
from .roi_align import MultiScaleRoIAlign, multiscale_roi_align, roi_align

__all__ = [
    "BatchNorm",
    "MultiScaleRoIAlign",
    "batch_norm_act",
    "NonLocalBlock",
    "batched_nms",
    "box_area",
    "box_iou",
    "clip_boxes",
    "decode_boxes",
    "encode_boxes",
    "fused_conv",
    "multiscale_roi_align",
    "nms",
    "nms_padded",
    "non_local",
    "roi_align",
]
