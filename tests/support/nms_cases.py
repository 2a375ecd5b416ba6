"""Boxes for the tests of non-maximum suppression, and its definition once more: as a property of a result."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from doublehead.ops import box_iou

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
THRESHOLDS = [0.0, 0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 1.0, -0.1, 1 / 3, 1e-7, NAN]
BAD = [NAN, INF, -INF, 0.0, -0.0, 3e38, -3e38, 1e-45, 1e300, 65504.0]


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


def make_images(integer: Callable[[int, int], int], choice: Callable[[list], object]) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, scores and groups of a small batch: clustered or on a grid, of any size, with bad values strewn in.

    Args:
        integer: draws an integer, both bounds among them.
        choice: draws one of a list.
    """
    batch, count = integer(1, 3), integer(0, 150)
    seed = integer(0, 2**16)
    boxes, scores = choice([clustered_boxes, integer_boxes])(batch * count, seed)
    generator = torch.Generator().manual_seed(seed)
    boxes, scores = boxes.double() * choice([1.0, 1.0, 1e-3, 37.7, 1e15, 1e-20]), scores.double()
    boxes = boxes + choice([0.0, 0.0, -400.0, 1e6])
    for tensor in (boxes.view(-1), scores):
        for _ in range(integer(0, 4) if tensor.numel() else 0):
            tensor[torch.randint(tensor.numel(), (1,), generator=generator)] = choice(BAD)
    if choice([False, True]) and count:  # inverted and degenerate boxes
        boxes[torch.randint(len(boxes), (3,), generator=generator)] = boxes[0].flip(0)
    groups = torch.randint(-1, choice([1, 2, 50]), (batch, count), generator=generator)
    boxes, scores = boxes.to(choice(DTYPES)), scores.to(choice(DTYPES))
    return boxes.view(batch, count, 4), scores.view(batch, count), groups


def random_images(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """`make_images` from a seed, where there is no Hypothesis."""
    generator = random.Random(seed)
    return make_images(generator.randint, generator.choice)


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
