"""What the paper's tables hold beside our rows: Table 2's parameters, and the other methods of Table 5.

Copied from Wu et al., CVPR 2020.  A leaf, as is `paper`, which shows them in its tables.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OtherMethod:
    """A row of somebody else's numbers, as the paper quotes them: nothing here trains it."""

    label: str
    """Method and the paper's number of its reference."""
    backbone: str
    published: tuple[float | None, ...]
    """Percent, in the order of the table's columns; None: the paper has a dash."""


TABLE_2_PARAMETERS = (None, 1.06, 2.13, 3.19, 4.25, 5.31, 6.38, 7.44, 4.13, 7.19, 10.25)
"""The conv-head's parameters by row, in M = 2^20; None: the FPN baseline, which has no conv-head."""

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
