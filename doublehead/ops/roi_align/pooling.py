"""What RoIAlign is told beside features and boxes, and how a box's size chooses its pyramid level."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple


class AddedTo(enum.IntEnum):
    """What the epsilon of a `LevelRule` is added to.

    With `s` the square root of a box's area, the box belongs on level

        LEVEL:            floor(canonical_level + log2(s / canonical_size) + epsilon)
        CANONICAL_RATIO:  floor(canonical_level + log2(s / canonical_size + epsilon))
        FINEST_RATIO:     floor(log2(s / finest_size + epsilon)) + the finest level's number

    where finest_size is the size that belongs on the finest level.
    """

    LEVEL = 0
    CANONICAL_RATIO = 1
    FINEST_RATIO = 2


class LevelRule(NamedTuple):
    """How a box's size chooses its level next to the border of two, and where the samples of a box end."""

    epsilon: float
    """Lifts a box that rounding puts just below a border."""
    added_to: AddedTo
    """Which quantity the epsilon lifts."""
    end_offset: float = 0.0
    """Boxes are sampled up to (x2 - end_offset, y2 - end_offset), in image pixels, after they are expanded."""


class Pooling(NamedTuple):
    """The operators' arguments after the tensors, in the order of their schemas."""

    spatial_scales: Sequence[float]
    box_scales: Sequence[float]
    output_size: Sequence[int]
    sampling_ratio: int
    aligned: bool
    canonical_size: float
    canonical_level: int
    level_epsilon: float
    epsilon_added_to: int
    """An `AddedTo`."""
    end_offset: float


#: `Pooling` in an operator's schema.
POOLING_SCHEMA = (
    "float[] spatial_scales, float[] box_scales, int[] output_size, int sampling_ratio, bool aligned, "
    "float canonical_size, int canonical_level, float level_epsilon, int epsilon_added_to, float end_offset"
)
