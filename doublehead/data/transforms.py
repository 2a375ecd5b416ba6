"""Transforms an image together with its boxes.  The model itself resizes and normalises.

`horizontal_flip` is exact.  `augmented` is made of torchvision.transforms.v2, which is imported when the first
image is augmented and not before.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from doublehead.config import AugmentConfig

from .dataset import Target

GREY = (124, 116, 104)
"""Levels around an image that was made smaller: the mean of ImageNet's, about 0 once the model has normalised them."""
LEAST_SIDE = 16
"""Images with a shorter side, in pixels, are not cropped or resized."""


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


def check_augmentation(config: AugmentConfig) -> None:
    """Check what the fields' own bounds do not.

    Raises:
        ValueError: `scale` is not in order.
    """
    if config.scale[0] > config.scale[1]:
        low, high = config.scale
        raise ValueError(f"train.augment.scale is {low:g} to {high:g}: the smaller factor comes first")


def is_off(config: AugmentConfig) -> bool:
    """Whether `augmented` would change nothing."""
    return tuple(config.scale) == (1.0, 1.0) and config.crop == 0 and config.colour == 0


def augmented(image: Tensor, target: Target, config: AugmentConfig, seed: int) -> tuple[Tensor, Target]:
    """Change colours, cut out a part, and resize the picture within its frame, as `config` says.

    A box is kept if its centre stays in the picture and one pixel of it is left, and ends at the picture's border.
    An image that had boxes keeps one at least: if none would be left, only its colours change.

    Args:
        image: `Tensor[3, H, W]` uint8.
        target: boxes between pixel edges.
        seed: all random numbers follow from it, and torch's own generators stay as they are.
    """
    from torchvision.transforms import v2

    with torch.random.fork_rng(devices=[]):  # v2 draws from the CPU's generator
        torch.default_generator.manual_seed(seed)
        if config.colour > 0:
            image = v2.ColorJitter(config.colour, config.colour, config.colour)(image)  # hue takes six times as long
        changed = _moved(image, target, config)
    return changed if len(changed[1]["boxes"]) or not len(target["boxes"]) else (image, target)


def _moved(image: Tensor, target: Target, config: AugmentConfig) -> tuple[Tensor, Target]:
    """Crop and resize."""
    from torchvision.transforms.v2 import RandomIoUCrop
    from torchvision.tv_tensors import BoundingBoxes

    if min(image.shape[-2:]) < LEAST_SIDE:
        return image, target
    boxes = BoundingBoxes(target["boxes"], format="XYXY", canvas_size=tuple(image.shape[-2:]))
    before, labels = boxes, target["labels"]
    if len(boxes) and float(torch.rand(())) < config.crop:
        image, boxes = RandomIoUCrop()(image, boxes)
        boxes, labels = _sanitized(boxes, labels)
    low, high = config.scale
    factor = math.exp(float(torch.empty(()).uniform_(math.log(low), math.log(high)))) if low < high else low
    if factor != 1 and min(image.shape[-2:]) >= LEAST_SIDE:
        image, boxes = (_smaller if factor < 1 else _larger)(image, boxes, factor)
        boxes, labels = _sanitized(boxes, labels)
    if boxes is before:
        return image, target
    return image, {**target, "boxes": boxes.as_subclass(Tensor).clone(), "labels": labels}


def _smaller(image: Tensor, boxes: Any, factor: float) -> tuple[Tensor, Any]:
    """The picture at a random place of its frame, `factor` as large, with grey around it."""
    from torchvision.transforms.v2 import functional as v2

    height, width = image.shape[-2:]
    size = [max(1, round(height * factor)), max(1, round(width * factor))]
    top, left = _random_up_to(height - size[0]), _random_up_to(width - size[1])
    around = [left, top, width - size[1] - left, height - size[0] - top]
    grey = torch.tensor(GREY, dtype=image.dtype)[:, None, None].expand(-1, height, width).clone()
    grey[:, top : top + size[0], left : left + size[1]] = v2.resize(image, size)
    return grey, v2.pad(v2.resize(boxes, size), around)


def _larger(image: Tensor, boxes: Any, factor: float) -> tuple[Tensor, Any]:
    """A part of the picture with the centre of a random box; the model's resizing makes it `factor` as large."""
    from torchvision.transforms.v2 import functional as v2

    height, width = image.shape[-2:]
    part = [max(1, round(height / factor)), max(1, round(width / factor))]
    low, high = [0, 0], [height - part[0], width - part[1]]
    centres = (boxes.as_subclass(Tensor)[:, :2] + boxes.as_subclass(Tensor)[:, 2:]) / 2
    if len(centres):
        x, y = centres[_random_up_to(len(centres) - 1)].tolist()
        low = [min(high[i], max(0, math.ceil(at - part[i]))) for i, at in enumerate((y, x))]
        high = [max(low[i], min(high[i], math.floor(at))) for i, at in enumerate((y, x))]
    top, left = (first + _random_up_to(last - first) for first, last in zip(low, high, strict=True))
    cut = v2.crop(boxes, top, left, *part)
    corner = torch.tensor([left, top])
    inside = ((centres >= corner) & (centres <= corner + torch.tensor([part[1], part[0]]))).all(1)
    cut[~inside] = 0  # marks it for `_sanitized`
    return v2.crop(image, top, left, *part).contiguous(), cut


def _sanitized(boxes: Any, labels: Tensor) -> tuple[Any, Tensor]:
    from torchvision.transforms.v2 import functional as v2

    boxes, kept = v2.sanitize_bounding_boxes(v2.clamp_bounding_boxes(boxes))
    return boxes, labels[kept]


def _random_up_to(most: int) -> int:
    """A whole number from 0 to `most`."""
    return int(torch.randint(most + 1, ()))
