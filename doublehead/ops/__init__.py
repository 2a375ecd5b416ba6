"""Operators on boxes and features.  They need torch alone.

`roi_align`, `MultiScaleRoIAlign`, `nms` and `batched_nms` take torchvision's arguments and give torchvision's results.
"""

from .boxes import box_area, box_iou, clip_boxes, decode_boxes, encode_boxes
from .detections import detections
from .nms import batched_nms, nms, nms_padded
from .roi_align import MultiScaleRoIAlign, multiscale_roi_align, roi_align
from .score_fusion import fuse_scores

__all__ = [
    "MultiScaleRoIAlign",
    "batched_nms",
    "box_area",
    "box_iou",
    "clip_boxes",
    "decode_boxes",
    "detections",
    "encode_boxes",
    "fuse_scores",
    "multiscale_roi_align",
    "nms",
    "nms_padded",
    "roi_align",
]
