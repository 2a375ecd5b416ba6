"""RoIAlign."""

from . import compatibility
from .module import MultiScaleRoIAlign
from .op import multiscale_roi_align, roi_align
from .pooling import AddedTo, LevelRule

__all__ = ["AddedTo", "LevelRule", "MultiScaleRoIAlign", "compatibility", "multiscale_roi_align", "roi_align"]
