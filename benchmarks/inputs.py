"""Inputs of the benchmarks: boxes as a detector proposes them, on the GPU where there is one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def generator(seed: int) -> torch.Generator:
    """Seeded, on `DEVICE`: large inputs are drawn where they are used. Devices draw different numbers."""
    return torch.Generator(DEVICE).manual_seed(seed)


def rpn_boxes(
    count: int,
    *,
    image_size: tuple[int, int] = (800, 1344),
    objects: int = 60,
    clustered: float = 0.7,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Boxes and scores as a region proposal network gives them.

    A share `clustered` of the boxes lies around `objects` objects, the further off the lower its
    score; the rest is background.  Sides are log-uniform between 16 and 600 pixels.  Uniformly
    random boxes would flatter NMS: they hardly overlap, so almost nothing depends on anything.

    Returns boxes `Tensor[count, 4]` (x1, y1, x2, y2 in pixels, inside the image) and distinct
    scores `Tensor[count]` in (0, 1), in no particular order, on `DEVICE`.
    """
    random = torch.Generator().manual_seed(seed)
    height, width = image_size
    extent = torch.tensor([float(width), float(height)])

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=random)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    def places(number: int) -> tuple[Tensor, Tensor]:
        side = 16 * torch.exp(uniform(number, 1) * math.log(600 / 16))
        aspect = torch.exp(0.35 * normal(number, 1))
        return uniform(number, 2) * extent, torch.cat((side * aspect, side / aspect), 1)

    near = round(count * clustered)
    object_centres, object_sizes = places(objects)
    which = (uniform(near) * objects).long()
    distance = 0.3 * uniform(near, 1)
    centres = object_centres[which] + distance * normal(near, 2) * object_sizes[which]
    sizes = object_sizes[which] * torch.exp(distance * normal(near, 2))
    far_centres, far_sizes = places(count - near)
    centres, sizes = torch.cat((centres, far_centres)), torch.cat((sizes, far_sizes))

    closeness = torch.cat((1 - 2 * distance[:, 0], torch.zeros(count - near)))
    scores = torch.sigmoid(4 * closeness - 2 + normal(count)).double()
    scores += torch.arange(count) * 1e-12  # tells ties apart before the rank below
    scores = (scores.argsort().argsort().float() + 0.5) / count  # distinct, so that every provider keeps the same

    corners = torch.cat((centres - sizes / 2, centres + sizes / 2), 1)
    limits = torch.cat((extent, extent))
    boxes = corners.clamp(min=torch.zeros(4), max=limits)
    boxes[:, :2] = torch.minimum(boxes[:, :2], limits[:2] - 1)
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    order = torch.randperm(count, generator=random)
    return boxes[order].to(DEVICE), scores[order].to(DEVICE)


def eighty_classes(each: int = 1_000) -> tuple[Tensor, Tensor, Tensor]:
    """80 classes of so many boxes each, shuffled, all scores distinct: boxes, scores, classes."""
    images = [rpn_boxes(each, seed=label) for label in range(80)]
    boxes, scores = (torch.cat(tensors) for tensors in zip(*images, strict=True))
    order = torch.randperm(80 * each, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    scores = (scores[order].argsort(stable=True).argsort() + 0.5) / 80 * each
    return boxes[order], scores, torch.arange(80, device=DEVICE).repeat_interleave(each)[order]
