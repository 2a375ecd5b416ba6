"""Level rules next to every border of two levels: kernels and reference against the projects' formulas, bit by bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from doublehead.ops import AddedTo, LevelRule, multiscale_roi_align
from doublehead.ops.roi_align import reference
from doublehead.ops.roi_align.level_rules import LEVEL_RULES
from doublehead.ops.roi_align.pooling import Pooling
from tests.cuda_emulation.build import ROOT, open_emulated
from tests.support.emulated_roi_align import forward as emulated

SCALES = [2.0**-level for level in range(7)]
PROJECTS = list(LEVEL_RULES)
projects = pytest.mark.parametrize("project", PROJECTS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
canonical = pytest.mark.parametrize(
    ("size", "level", "finest"), [(224.0, 4, 0), (56.0, 3, 0), (100.3, 5, 0), (7.7, 4, 2), (640.0, 6, 1)], ids=str
)


def restated(boxes: Tensor, project: str, size: float, level: int, finest: int) -> Tensor:
    """The projects' formulas in C++ (tests/restatements/level_rules.cpp)."""
    levels = torch.empty(len(boxes), dtype=torch.int64)
    open_emulated(str(ROOT / "tests/restatements/level_rules.cpp")).call(
        "level_rule", boxes.contiguous(), len(boxes), int(boxes.dtype == torch.float64), PROJECTS.index(project), size,
        level, finest, len(SCALES) - finest, levels,
    )  # fmt: skip
    return levels


def restated_in_torch(boxes: Tensor, project: str, size: float, level: int, finest: int) -> Tensor:
    """The same formulas in PyTorch, whose logarithms may be rounded otherwise."""
    s = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    canonical_size, finest_size = s.new_tensor(size), s.new_tensor(size * 2.0 ** (finest - level))
    levels = {
        "torchvision": (level + (s / canonical_size).log2() + 1e-6).floor() - finest,
        "detectron2": (level + (s / canonical_size + 1e-8).log2()).floor() - finest,
        "mmdet": (s / finest_size + 1e-6).log2().floor(),
        "maskrcnn_benchmark": (level + (s / canonical_size + 1e-6).log2()).floor() - finest,
    }[project]
    return levels.clamp(0, len(SCALES) - 1 - finest).long()


def squares(sides: Tensor) -> Tensor:
    """Boxes about the origin: their sides are these exactly, and whatever their size a sample reads pixel 0."""
    return torch.stack([-sides / 2, -sides / 2, sides / 2, sides / 2], 1)


def boxes_at_borders(dtype, project: str, size: float, level: int, finest: int) -> Tensor:
    """At and next to every border as it is written, and as the rule with its epsilon moves it; and some oblongs."""
    inf = torch.tensor(torch.inf, dtype=dtype)
    written = size * 2.0 ** torch.arange(finest - level, len(SCALES) - level + 1, dtype=dtype)
    low, high = written * 0.99, written * 1.01
    for _ in range(64):  # bisection, down to two neighbouring numbers
        middle = (low + high) / 2
        below = restated(squares(middle), project, size, level, finest) == restated(
            squares(written * 0.99), project, size, level, finest
        )
        low, high = middle.where(below, low), middle.where(~below, high)
    sides = []
    for start in (written, low):
        down = up = start
        for _ in range(8):
            down, up = down.nextafter(-inf), up.nextafter(inf)
            sides += [down, up]
        sides += [start, start * 0.999, start * 1.001, start * (1 - 3e-6), start * (1 - 3e-7), start * (1 - 1e-8)]
    boxes = squares(torch.cat(sides))
    generator = torch.Generator().manual_seed(0)
    aspect = torch.rand(len(boxes), 1, dtype=dtype, generator=generator) + 0.5
    return torch.cat([boxes, boxes * torch.cat([aspect, 1 / aspect, aspect, 1 / aspect], 1)])


def pooling_of(rule: LevelRule, size: float, level: int, finest: int) -> Pooling:
    return Pooling(SCALES[finest:], [1.0], (1, 1), 1, False, size, level, *rule)


def maps(dtype, finest: int) -> list[Tensor]:
    """A pixel for each level, which holds its number."""
    return [torch.full((1, 1, 1, 1), float(level), dtype=dtype) for level in range(len(SCALES) - finest)]


def by_cpu(boxes: Tensor, rule: LevelRule, size: float, level: int, finest: int) -> Tensor:
    (pooled,) = multiscale_roi_align(
        maps(boxes.dtype, finest), torch.nn.functional.pad(boxes, (1, 0)), 1, spatial_scales=SCALES[finest:],
        sampling_ratio=1, canonical_size=size, canonical_level=level, level_rule=rule,
    )  # fmt: skip
    return pooled.flatten().long()


@canonical
@dtypes
@projects
def test_kernels_and_reference_at_every_border(project, dtype, size, level, finest):
    boxes = boxes_at_borders(dtype, project, size, level, finest)
    expected = restated(boxes, project, size, level, finest)
    assert expected.unique().numel() > 3
    rule = LEVEL_RULES[project]
    assert torch.equal(by_cpu(boxes, rule, size, level, finest), expected)
    pooling = pooling_of(rule, size, level, finest)
    (pooled,) = emulated(maps(dtype, finest), torch.nn.functional.pad(boxes, (1, 0)), *pooling)
    assert torch.equal(pooled.flatten().long(), expected)
    plain = reference.box_levels(boxes, pooling)
    assert torch.equal(plain, restated_in_torch(boxes, project, size, level, finest))


@dtypes
@projects
def test_these_boxes_tell_another_epsilon_and_another_place(project, dtype):
    rule, place = LEVEL_RULES[project], (224.0, 6, 0)
    boxes = boxes_at_borders(dtype, project, *place)
    expected = by_cpu(boxes, rule, *place)
    others = [rule._replace(epsilon=epsilon) for epsilon in (0.0, 3e-8, 1e-7, 5e-6)]
    others += [rule._replace(added_to=other) for other in AddedTo if other != rule.added_to]
    for other in others:
        assert not torch.equal(by_cpu(boxes, other, *place), expected), other
