"""RoIAlign."""

from .module import MultiScaleRoIAlign
from .op import multiscale_roi_align, roi_align

__all__ = ["MultiScaleRoIAlign", "multiscale_roi_align", "roi_align"]
