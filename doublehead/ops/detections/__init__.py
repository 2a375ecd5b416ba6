"""From the heads' logits and box deltas to the best detections of each image."""

from .op import detections

__all__ = ["detections"]
