"""Boxes for the tests of non-maximum suppression, and its definition once more: as a property of a result."""

from __future__ import annotations

import torch
from torch import Tensor

from doublehead.ops import box_iou

NAN, INF = float("nan"), float("inf")


def clustered_boxes(count: int, seed: int, *, objects: int = 20, spread: float = 0.15) -> tuple[Tensor, Tensor]:
    """Boxes of many sizes, several around each object, and scores with ties."""
    generator = torch.Generator().manual_seed(seed)
    sides = 16 * torch.exp(torch.rand(objects, 2, generator=generator) * 3.5)
    centres = torch.rand(objects, 2, generator=generator) * torch.tensor([1344.0, 800.0])
    which = torch.randint(objects, (count,), generator=generator)
    centre = centres[which] + spread * sides[which] * torch.randn(count, 2, generator=generator)
    side = sides[which] * torch.exp(spread * torch.randn(count, 2, generator=generator))
    scores = torch.rand(count, generator=generator).mul(count).round() / max(count, 1)
    return torch.cat((centre - side / 2, centre + side / 2), 1), scores


def integer_boxes(count: int, seed: int, *, extent: int = 20) -> tuple[Tensor, Tensor]:
    """Boxes on a small grid, without area now and then: their IoUs often are simple fractions, such as a threshold."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(extent, (count, 2), generator=generator)
    sides = torch.randint(extent // 2, (count, 2), generator=generator)
    return torch.cat((corners, corners + sides), 1).float(), torch.rand(count, generator=generator)


def is_greedy_result(kept: Tensor, boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float) -> bool:
    """Whether `kept` is what greedy suppression by class gives: a box is in it if and only if no better one in it, of
    its class, suppresses it.  Only one set has that property.  The scores must be distinct."""
    if not torch.equal(kept, kept[scores[kept].argsort(descending=True)]):
        return False
    chosen = torch.zeros(len(boxes), dtype=torch.bool)
    chosen[kept] = True
    members = classes.argsort().split(classes.unique(return_counts=True)[1].tolist())
    for here in members:
        inside = here[chosen[here]]
        suppresses = box_iou(boxes[inside], boxes[here]).double() > threshold
        suppresses &= scores[inside][:, None] > scores[here][None]
        if not torch.equal(chosen[here], ~suppresses.any(0)):
            return False
    return True
