"""Finds the proposals from which a duplicated object's boxes come, and where each head moves them (Figure 10).

Both heads of an Ext see the same proposals.  A duplicate comes from an inaccurate proposal, which one head moves to a
separate box and the other onto the object's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from doublehead.analysis.readers import ImageFeatures, Reader
from doublehead.data import Target

if TYPE_CHECKING:
    from doublehead.analysis.qualitative_cases import Case

HEADS = ("conv", "fc")
SAME_BOX = 0.5
"""Pixels by which a detection may differ from the moved proposal, because of rounding."""
CHUNK = 512


class Origin(NamedTuple):
    """A proposal that became a detection of the object; boxes are x1, y1, x2, y2 in the image's pixels."""

    proposal: Tensor
    """`Tensor[4]`."""
    moved: dict[str, Tensor]
    """Head -> `Tensor[4]`: where its regressor of the object's class moves the proposal."""


def find_origins(readers: dict[str, Reader], image: Tensor, target: Target, case: Case, boxes: Tensor) -> list[Origin]:
    """The proposals from which the case's head made its detections `boxes`.

    Args:
        readers: "conv" and "fc", of one model.
        image: `Tensor[3, H, W]` uint8, on the model's device.
        target: the image's ground truth.
        case: gives the head and the class.
        boxes: `Tensor[D, 4]`, the head's detections of the object, in the image's pixels.

    Returns:
        One for each detection, in order; a proposal that is the origin of two detections is there once.
    """
    features = readers["fc"].features(image, target["boxes"])
    proposals = readers["fc"].proposals(features)
    if len(proposals) == 0:
        return []
    moved = {name: _moved(readers[name], features, proposals, case.label) for name in HEADS}
    found: dict[int, Origin] = {}
    for box in boxes:
        distance = (moved[case.kind.head] - box).abs().amax(1)
        nearest = int(distance.argmin())
        if distance[nearest] <= SAME_BOX:
            proposal = features.into_image(proposals[nearest]).cpu()
            found.setdefault(nearest, Origin(proposal, {name: values[nearest] for name, values in moved.items()}))
    return list(found.values())


def _moved(reader: Reader, features: ImageFeatures, proposals: Tensor, label: int) -> Tensor:
    """The proposals moved by the regressor of a class: `Tensor[R, 4]`, the image's pixels, on the CPU."""
    labels = torch.full((len(proposals),), label, device=proposals.device)
    return features.into_image(reader.read_all(features, proposals, labels, CHUNK).boxes).cpu()
