"""The other methods that the paper quotes in Table 5."""

from __future__ import annotations

from .schema import OtherMethod

TABLE_5_OTHERS = (
    OtherMethod("FPN [26]", "ResNet-101", (36.2, 59.1, 39.0, 18.2, 39.0, 48.2)),
    OtherMethod("Mask R-CNN [13]", "ResNet-101", (38.2, 60.3, 41.7, 20.1, 41.1, 50.2)),
    OtherMethod("Deep Regionlets [43]", "ResNet-101", (39.3, 59.8, None, 21.7, 43.7, 50.9)),
    OtherMethod("IoU-Net [20]", "ResNet-101", (40.6, 59.0, None, None, None, None)),
    OtherMethod("Soft-NMS [2]", "Aligned-Inception-ResNet", (40.9, 62.8, None, 23.3, 43.6, 53.3)),
    OtherMethod("LTR [38]", "ResNet-101", (41.0, 60.8, 44.5, 23.2, 44.5, 52.5)),
    OtherMethod("Fitness NMS [40]", "DeNet-101 [39]", (41.8, 60.9, 44.9, 21.5, 45.0, 57.5)),
)
"""Single models on COCO test-dev, in the paper's order."""
