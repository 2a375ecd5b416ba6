"""torchvision's detectors: accelerates models in place, or converts their weights."""

from .weights import convert_faster_rcnn, faster_rcnn_config

__all__ = ["convert_faster_rcnn", "faster_rcnn_config"]
