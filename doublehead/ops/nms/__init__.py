"""Non-maximum suppression."""

from .op import batched_nms, nms, nms_padded

__all__ = ["batched_nms", "nms", "nms_padded"]
