"""Groups of objects: by size, as in COCO, and by the difficulty of their class."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from doublehead.data.files import MIN_SIDE
from doublehead.engine.run import METRICS_FILE
from doublehead.errors import UserError

SIZES = ("small", "medium", "large")
LIMITS = (32.0**2, 96.0**2)
"""Areas in pixels of the stored image: small is [0, 32^2), medium [32^2, 96^2), large is everything above."""
UNMATCHED = len(SIZES)
"""The size index of a box that belongs to no object."""
DIFFICULTIES = ("easy classes", "medium classes", "hard classes")


class Group(NamedTuple):
    """A group of objects."""

    name: str
    classes: tuple[int, ...]
    """Indices into the data set's list of classes."""
    sizes: tuple[int, ...]
    """Indices into `SIZES`, or `UNMATCHED`."""


def find_groups(classes: Sequence[str], difficulty: str | None) -> list[Group]:
    """All, small, medium, large and, with `difficulty`, easy, medium and hard classes.

    Args:
        classes: the data set's classes.
        difficulty: a metrics.json, or the folder of a run with one.

    Raises:
        UserError: see `read_class_ap`; fewer than three classes have an AP.
    """
    every, sized = tuple(range(len(classes))), tuple(range(len(SIZES)))
    groups = [Group("all", every, (*sized, UNMATCHED))]
    groups += [Group(name, every, (size,)) for size, name in enumerate(SIZES)]
    if difficulty is None:
        return groups
    thirds = difficulty_thirds(read_class_ap(difficulty, classes))
    if not all(thirds):
        raise UserError(f"--difficulty {difficulty}: ranking needs the AP of at least three classes of the data")
    return groups + [Group(name, third, sized) for name, third in zip(DIFFICULTIES, thirds, strict=True)]


def difficulty_thirds(ap: Sequence[float | None]) -> list[tuple[int, ...]]:
    """Easy, medium and hard classes: the indices of the highest, middle and lowest third by AP, without None.

    Ties keep their order.  If the number is not a multiple of three, the easier thirds are larger.
    """
    known = [index for index, value in enumerate(ap) if value is not None]
    ranked = sorted(known, key=lambda index: -ap[index])
    third, rest = divmod(len(ranked), 3)
    ends = [third + (rest > 0), 2 * third + rest]
    return [tuple(sorted(part)) for part in (ranked[: ends[0]], ranked[ends[0] : ends[1]], ranked[ends[1] :])]


def read_class_ap(path: str, classes: Sequence[str]) -> list[float | None]:
    """The AP of each class from a run's metrics; None where there was nothing to measure.

    Raises:
        UserError: the file does not exist, is not a metrics.json, or lacks a class of the data set.
    """
    file = Path(path) / METRICS_FILE if Path(path).is_dir() else Path(path)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--difficulty {file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--difficulty {file}: not a metrics.json: {error}") from error
    measured = found.get("classes") if isinstance(found, dict) else None
    if not isinstance(measured, dict) or not all(_is_measured(values) for values in measured.values()):
        raise UserError(f"--difficulty {file}: has no AP of classes; give the metrics.json of a trained run")
    if missing := [name for name in classes if name not in measured]:
        raise UserError(f"--difficulty {file}: lacks the class {missing[0]!r} of the data ({len(missing)} are missing)")
    return [measured[name]["AP"] for name in classes]


def object_sizes(image_ids: Sequence[int], annotations: Iterable[dict[str, Any]]) -> dict[int, Tensor]:
    """Image id -> size indices (see `SIZES`) of its objects, `Tensor[n]` int64, in the order of the image's target.

    Sizes go by the annotations' areas (in COCO, the masks'), as in COCO's evaluation.  An area equal to a limit is in
    both groups there, and in the larger one here.  As in targets, crowd and difficult objects and boxes without area
    are left out.
    """
    areas: dict[int, list[float]] = defaultdict(list)
    for annotation in annotations:
        if not annotation["iscrowd"] and min(annotation["bbox"][2:]) >= MIN_SIDE:
            areas[annotation["image_id"]].append(annotation["area"])
    limits = torch.tensor(LIMITS, dtype=torch.float64)
    return {
        image_id: torch.bucketize(torch.tensor(areas[image_id], dtype=torch.float64), limits, right=True)
        for image_id in image_ids
    }


def describe(groups: Sequence[Group], classes: Sequence[str], sizes: dict[int, Tensor]) -> list[str]:
    """Lines with the number of objects of each size and the classes that are easy, medium and hard."""
    counts = torch.cat(list(sizes.values())).bincount(minlength=len(SIZES)).tolist()
    lines = ["objects: " + ", ".join(f"{count:,} {name}" for count, name in zip(counts, SIZES, strict=True))]
    ranked = [group for group in groups if group.name in DIFFICULTIES]
    lines += [f"{group.name}: {', '.join(classes[index] for index in group.classes)}" for group in ranked]
    in_none = [name for index, name in enumerate(classes) if not any(index in group.classes for group in ranked)]
    if ranked and in_none:
        lines.append(f"neither easy, medium nor hard, for lack of an AP: {', '.join(in_none)}")
    return lines


def _is_measured(values: Any) -> bool:
    return isinstance(values, dict) and isinstance(values.get("AP", ""), float | int | None)
