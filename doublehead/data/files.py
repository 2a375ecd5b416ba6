"""What the data sets made of files share: checking each record, keeping what is good, counting the rest."""

from __future__ import annotations

import itertools
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from .dataset import DataError, DataWarning, DetectionDataset, Target, make_target
from .images import check_image, read_image

Box = tuple[float, float, float, float]

MIN_SIDE = 0.01
"""Thinner boxes are degenerate: in float32 their edges could fall together."""
ROUNDING = 1e-3
"""Pixels beyond the border that are arithmetic (x + width of decimal fractions), not worth a notice."""


@dataclass
class RawObject:
    """One annotation as read; `box` is x1, y1, x2, y2 between pixel edges, not yet held against the image."""

    where: str
    id: int
    label: int
    box: Box
    ignore: bool = False
    """Crowd or difficult: not trained on, neither hit nor miss in evaluation."""
    coco_box: Box | None = None
    """x, y, width, height for the ground truth; None: those of the clipped box."""
    area: float | None = None
    """None: the clipped box's."""


@dataclass
class RawImage:
    """One image as read; `size` is (height, width) as the annotation says, None where it says nothing.

    `errors` are those of its annotations that could not even be read.
    """

    image_id: int
    file_name: str
    path: str
    size: tuple[int, int] | None
    objects: list[RawObject] = field(default_factory=list)
    errors: list[DataError] = field(default_factory=list)


class Problems:
    """Bad records: the first one is an error, or each is counted and one warning sums them up."""

    def __init__(self, name: str, skip: bool):
        self.name, self.skip = name, skip
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self.clipped = 0

    def report(self, error: DataError) -> None:
        if not self.skip:
            hint = "Correct it, or leave such records out with on_bad_record='skip' (--data.on-bad-record skip)."
            raise DataError(f"{error}. {hint}", error.reason) from error
        self.counts[error.reason] += 1
        self.first.setdefault(error.reason, str(error))

    def clip(self, where: str) -> None:
        self.clipped += 1
        self.first.setdefault("clipped", where)

    def warn(self) -> None:
        lines = [f"left out {count} x {reason}, first: {self.first[reason]}" for reason, count in self.counts.items()]
        if self.clipped:
            lines.append(f"cut {self.clipped} x box at the image's border, first: {self.first['clipped']}")
        if lines:
            warnings.warn("\n  ".join([f"{self.name}:", *lines]), DataWarning, stacklevel=2)


class FileDataset(DetectionDataset):
    """Images in files, annotations in memory (as flat arrays, which worker processes share).

    Args:
        images: read lazily; reading stops when `limit` images are kept.
        train: leave out images without boxes.
        limit: keep only the first so many images that can be used.
        problems: where bad records go.  When they are skipped, a training image that only turns out broken when it
            is decoded is replaced by the loader; the images of other splits are all decoded here, for an evaluation
            must not change under way.

    Raises:
        DataError: a bad record, unless they are skipped; no image left.
    """

    def __init__(
        self, name: str, classes: list[str], category_ids: list[int], images: Iterable[RawImage | DataError],
        *, train: bool, limit: int | None, problems: Problems, horizontal_flip: float,
    ):  # fmt: skip
        self.name, self.classes, self.category_ids = name, classes, category_ids
        self.horizontal_flip, self.replace_unreadable = horizontal_flip, train and problems.skip
        self.unused = Counter()
        self.image_ids, self.file_names, self.image_sizes, self._paths = [], [], [], []
        kept: list[RawObject] = []
        ends = [0]
        for image, size in _checked(images, problems, decode=problems.skip and not train):
            objects = list(_checked_boxes(image, size, problems))
            if train and all(item.ignore for item in objects):
                self.unused["image without boxes"] += 1
                continue
            self._paths.append(image.path)
            self.image_ids.append(image.image_id)
            self.file_names.append(image.file_name)
            self.image_sizes.append(size)
            kept += objects
            ends.append(len(kept))
            if len(self._paths) == limit:
                break
        self.skipped, self.clipped = problems.counts, problems.clipped
        problems.warn()
        if not self._paths:
            raise DataError(f"{name}: no image{' with a box' if train else ''} is left", "empty set")
        self._store(kept, np.array(ends))

    def _store(self, objects: list[RawObject], ends: np.ndarray) -> None:
        self._ends = ends
        self._boxes = np.array([item.box for item in objects], np.float64).reshape(-1, 4)
        self._labels = np.array([item.label for item in objects], np.int64)
        self._ignore = np.array([item.ignore for item in objects], bool)
        self._ids = np.array([item.id for item in objects], np.int64)
        self._coco_boxes = np.array([item.coco_box or _xywh(item.box) for item in objects], np.float64).reshape(-1, 4)
        areas = [_xywh(item.box)[2] * _xywh(item.box)[3] if item.area is None else item.area for item in objects]
        self._areas = np.array(areas, np.float64)
        if self._ignore.any():
            self.unused["crowd or difficult box"] += int(self._ignore.sum())

    def load(self, index: int) -> tuple[Tensor, Target]:
        image = read_image(self._paths[index], self.image_sizes[index])
        mine = slice(self._ends[index], self._ends[index + 1])
        seen = ~self._ignore[mine]
        return image, make_target(self._boxes[mine][seen], self._labels[mine][seen], self.image_ids[index])

    def annotations(self) -> list[dict[str, Any]]:
        image_ids = np.repeat(np.array(self.image_ids, np.int64), np.diff(self._ends)).tolist()
        categories = [self.category_ids[label - 1] for label in self._labels.tolist()]
        columns = (self._ids.tolist(), image_ids, categories, self._coco_boxes.tolist(), self._areas.tolist(),
                   self._ignore.tolist())  # fmt: skip
        return [
            {"id": i, "image_id": image, "category_id": category, "bbox": box, "area": area,
             "iscrowd": int(ignore), "ignore": int(ignore)}
            for i, image, category, box, area, ignore in zip(*columns, strict=True)
        ]  # fmt: skip


def _checked(
    images: Iterable[RawImage | DataError], problems: Problems, decode: bool
) -> Iterator[tuple[RawImage, tuple[int, int]]]:
    """Images whose file is there and sound, with their (height, width); files are looked at in parallel."""

    def check(image: RawImage | DataError) -> tuple[int, int] | DataError:
        if isinstance(image, DataError):
            return image
        try:
            return check_image(image.path, image.size, decode)
        except DataError as error:
            return error

    source = iter(tqdm(images, f"{problems.name}: checking", unit=" images", disable=None, delay=2, leave=False))
    with ThreadPoolExecutor(8) as pool:
        while chunk := list(itertools.islice(source, 64)):
            for image, size in zip(chunk, pool.map(check, chunk), strict=True):
                if isinstance(size, DataError):
                    problems.report(size)
                else:
                    yield image, size


def _checked_boxes(image: RawImage, size: tuple[int, int], problems: Problems) -> Iterator[RawObject]:
    """The objects with a box in the image, clipped to it."""
    for error in image.errors:
        problems.report(error)
    for item in image.objects:
        try:
            clipped = _clipped(item, size)
        except DataError as error:
            problems.report(error)
            continue
        if max(abs(a - b) for a, b in zip(clipped, item.box, strict=True)) > ROUNDING:
            problems.clip(item.where)
        item.box = clipped
        yield item


def _clipped(item: RawObject, size: tuple[int, int]) -> Box:
    x1, y1, x2, y2 = item.box
    height, width = size
    said = f"x1={x1:g} y1={y1:g} x2={x2:g} y2={y2:g}"
    if not all(map(math.isfinite, item.box)):
        raise DataError(f"{item.where}: box {said} is not finite", "non-finite box")
    if x2 - x1 < MIN_SIDE or y2 - y1 < MIN_SIDE:
        raise DataError(f"{item.where}: degenerate box {said}; x1 < x2 and y1 < y2 are accepted", "degenerate box")
    inside = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    if inside[2] - inside[0] < MIN_SIDE or inside[3] - inside[1] < MIN_SIDE:
        message = f"{item.where}: box {said} lies outside the image of {width}x{height} pixels (width x height)"
        raise DataError(message, "box outside the image")
    return inside


def _xywh(box: Box) -> Box:
    return box[0], box[1], box[2] - box[0], box[3] - box[1]
