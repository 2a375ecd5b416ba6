"""The detectors of "Rethinking Classification and Localization for Object Detection" (CVPR 2020)."""

from .detector import Detector, DoubleHeadRCNN, build_detector
from .structures import Detections, ImageBatch, Proposals, Targets

__all__ = ["Detections", "Detector", "DoubleHeadRCNN", "ImageBatch", "Proposals", "Targets", "build_detector"]
