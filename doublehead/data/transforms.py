"""Transforms an image together with its boxes.  The model itself resizes and normalises."""

from __future__ import annotations

from torch import Tensor

from .dataset import Target


def horizontal_flip(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Mirror left and right.

    Args:
        image: `Tensor[3, H, W]`.
        target: boxes between pixel edges; x becomes exactly W - x.
    """
    x1, y1, x2, y2 = target["boxes"].unbind(-1)
    width = image.shape[-1]
    boxes = target["boxes"].new_empty(target["boxes"].shape)
    for column, values in enumerate((width - x2, y1, width - x1, y2)):
        boxes[:, column] = values
    return image.flip(-1), {**target, "boxes": boxes}
