"""torchvision's detectors: made faster where they are, or their weights brought here."""

from .weights import convert_faster_rcnn, faster_rcnn_config

__all__ = ["convert_faster_rcnn", "faster_rcnn_config"]
