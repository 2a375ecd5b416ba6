"""Data sets in files: checks each record, keeps the good ones and counts the rest.

Real data sets, such as COCO's train2017, have boxes without area (zero width or height, or thinner than `MIN_SIDE`).
They are not targets, and are counted and reported whatever the policy for bad records is.  In an evaluation they stay
in the ground truth, where pycocotools counts them as missed, so that results equal those of the official tools.  A box
with another defect (swapped corners, not finite, outside the image) is a bad record.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from ..errors import DataError
from .dataset import DetectionDataset, Target, make_target
from .images import MAX_PIXELS, check_image, read_image
from .problems import Problems

Box = tuple[float, float, float, float]

MIN_SIDE = 0.01
"""The smallest side of a box with area, in pixels; thinner boxes may have equal edges in float32."""
ROUNDING = 1e-3
"""Pixels by which rounding (x + width in decimals) may move a box over the border, without a note."""


@dataclass
class RawObject:
    """One annotation as read; `box` is x1, y1, x2, y2 between pixel edges, not yet compared with the image."""

    where: str
    id: int
    label: int
    box: Box
    ignore: bool = False
    """Whether the object is crowd or difficult: not trained on, and neither a hit nor a miss in an evaluation."""
    coco_box: Box | None = None
    """x, y, width, height for the ground truth; None: the clipped box."""
    area: float | None = None
    """The area for the ground truth; None: the clipped box's."""
    without_area: bool = False
    """Whether the box has no area: not trained on, but to be found in an evaluation, as in the official tools."""


@dataclass
class RawImage:
    """One image as read; `size` is (height, width) from the annotation, None if it has none.

    `errors` are those of its annotations that could not be read; `left_out` counts its objects that are valid, but not
    wanted, by reason.
    """

    image_id: int
    file_name: str
    path: str
    size: tuple[int, int] | None
    objects: list[RawObject] = field(default_factory=list)
    errors: list[DataError] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    shown_upright: bool = False
    """Whether its boxes refer to the image turned upright, see `images`."""


CLIPPED = "cut {} x box at the image's border"
UNTRAINED = "did not train on {} x box without area (zero width or height)"
UNMATCHED = "kept {} x box without area (zero width or height) in the ground truth, where it counts as missed"


class FileDataset(DetectionDataset):
    """Images in files, with annotations in memory, as flat arrays that worker processes share.

    Args:
        images: read lazily; reading stops when `limit` images are kept.
        train: leave out images without boxes.
        background: in training, keep images without any object (but not those with crowds alone, or whose objects were
            bad records: they do show something).
        limit: the number of usable images to keep.
        max_pixels: a larger image is a bad record.
        problems: collects bad records.  If they are skipped, the loader replaces a training image that turns out to be
            broken when it is decoded; images of other splits are all decoded here, because an evaluation must not
            change while it runs.

    Raises:
        DataError: a bad record, unless they are skipped; no image is left, or too many were skipped (see `Problems`).
    """

    def __init__(
        self, name: str, classes: list[str], category_ids: list[int], images: Iterable[RawImage | DataError],
        *, train: bool, limit: int | None, problems: Problems, horizontal_flip: float, background: bool = False,
        max_pixels: int = MAX_PIXELS,
    ):  # fmt: skip
        self.name, self.classes, self.category_ids = name, classes, category_ids
        self.horizontal_flip, self.replace_unreadable = horizontal_flip, train and problems.skip
        self.unused, self._max_pixels = Counter(), max_pixels
        self.image_ids, self.file_names, self.image_sizes, self._paths, self._upright = [], [], [], [], []
        kept: list[RawObject] = []
        ends = [0]
        read = objects_read = 0
        for image, size in _checked(images, problems, problems.skip and not train, max_pixels):
            bare = not image.objects and not image.errors
            objects = list(_checked_boxes(image, size, problems, UNTRAINED if train else UNMATCHED))
            read, objects_read = read + 1, objects_read + len(objects)
            self.unused += image.left_out
            if train and not any(map(_is_target, objects)) and not (bare and background):
                self.unused["image without boxes"] += 1
                self.unused["box without area"] += sum(item.without_area for item in objects)
                continue
            self._paths.append(image.path)
            self._upright.append(image.shown_upright)
            self.image_ids.append(image.image_id)
            self.file_names.append(image.file_name)
            self.image_sizes.append(size)
            kept += objects
            ends.append(len(kept))
            if len(self._paths) == limit:
                break
        self.skipped, self.clipped = problems.counts, problems.notes[CLIPPED]
        self.max_replaced = problems.most(len(self._paths))
        problems.check_shares(read, objects_read, complete=len(self._paths) != limit)
        problems.warn()
        if not self._paths or (train and not any(map(_is_target, kept))):
            why = f"; not used: {self.left_out()}" if self.left_out() else ""
            raise DataError(f"{name}: no image{' with a box' if train else ''} is left{why}", "empty set")
        self._store(kept, np.array(ends))
        self.unused = +self.unused

    @property
    def has_objects(self) -> bool:
        """Whether any image has an annotation."""
        return len(self._labels) > 0

    def _store(self, objects: list[RawObject], ends: np.ndarray) -> None:
        self._ends = ends
        self._boxes = np.array([item.box for item in objects], np.float64).reshape(-1, 4)
        self._labels = np.array([item.label for item in objects], np.int64)
        self._ignore = np.array([item.ignore for item in objects], bool)
        self._targets = np.array([_is_target(item) for item in objects], bool)
        # pycocotools treats a detection that is matched to annotation 0 as unmatched.
        numbered_anew = any(item.id == 0 for item in objects)
        ids = [number if numbered_anew else item.id for number, item in enumerate(objects, 1)]
        huge = any(abs(number) >= 2**63 for number in ids)
        self._ids = np.array(ids, object if huge else np.int64)
        self._coco_boxes = np.array([item.coco_box or _xywh(item.box) for item in objects], np.float64).reshape(-1, 4)
        areas = [_xywh(item.box)[2] * _xywh(item.box)[3] if item.area is None else item.area for item in objects]
        self._areas = np.array(areas, np.float64)
        if self._ignore.any():
            self.unused["crowd or difficult box"] += int(self._ignore.sum())
        self.unused["box without area"] += sum(item.without_area for item in objects)

    @property
    def paths(self) -> list[str]:
        """The image's file by index."""
        return self._paths

    def load(self, index: int) -> tuple[Tensor, Target]:
        image = read_image(
            self._paths[index], self.image_sizes[index], shown_upright=self._upright[index], max_pixels=self._max_pixels
        )
        mine = slice(self._ends[index], self._ends[index + 1])
        seen = self._targets[mine]
        return image, make_target(self._boxes[mine][seen], self._labels[mine][seen], self.image_ids[index])

    def annotations(self) -> list[dict[str, Any]]:
        counts = np.diff(self._ends).tolist()
        image_ids = [i for i, count in zip(self.image_ids, counts, strict=True) for _ in range(count)]
        categories = [self.category_ids[label - 1] for label in self._labels.tolist()]
        columns = (self._ids.tolist(), image_ids, categories, self._coco_boxes.tolist(), self._areas.tolist(),
                   self._ignore.tolist())  # fmt: skip
        return [
            {"id": i, "image_id": image, "category_id": category, "bbox": box, "area": area,
             "iscrowd": int(ignore), "ignore": int(ignore)}
            for i, image, category, box, area, ignore in zip(*columns, strict=True)
        ]  # fmt: skip


def _checked(
    images: Iterable[RawImage | DataError], problems: Problems, decode: bool, max_pixels: int
) -> Iterator[tuple[RawImage, tuple[int, int]]]:
    """Images with a valid file, and their (height, width); files are checked in parallel."""

    def check(image: RawImage | DataError) -> tuple[int, int] | DataError:
        if isinstance(image, DataError):
            return image
        try:
            return check_image(image.path, image.size, decode, max_pixels, image.shown_upright)
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


def _checked_boxes(
    image: RawImage, size: tuple[int, int], problems: Problems, without_area: str
) -> Iterator[RawObject]:
    """The objects with valid boxes, clipped to the image; `without_area` is the note for boxes without area."""
    for error in image.errors:
        problems.report(error, of_object=True)
    for item in image.objects:
        try:
            item.without_area = _has_no_area(item)
            clipped = _clipped(item, size)
        except DataError as error:
            problems.report(error, of_object=True)
            continue
        if item.without_area:
            problems.note(without_area, item.where)
        elif max(abs(a - b) for a, b in zip(clipped, item.box, strict=True)) > ROUNDING:
            problems.note(CLIPPED, item.where)
        item.box = clipped
        yield item


def _has_no_area(item: RawObject) -> bool:
    x1, y1, x2, y2 = item.box
    if not all(map(math.isfinite, item.box)):
        raise DataError(f"{item.where}: box {_said(item.box)} is not finite", "non-finite box")
    if x2 < x1 or y2 < y1:
        message = f"{item.where}: degenerate box {_said(item.box)}; x1 < x2 and y1 < y2 are accepted"
        raise DataError(message, "degenerate box")
    width, height = (item.coco_box or _xywh(item.box))[2:]  # as in the file: x + width may round
    return width < MIN_SIDE or height < MIN_SIDE


def _clipped(item: RawObject, size: tuple[int, int]) -> Box:
    x1, y1, x2, y2 = item.box
    height, width = size
    inside = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    least = 0.0 if item.without_area else MIN_SIDE - ROUNDING
    if inside[2] - inside[0] < least or inside[3] - inside[1] < least:
        message = f"{item.where}: box {_said(item.box)} lies outside the image of {width}x{height} pixels "
        raise DataError(message + "(width x height)", "box outside the image")
    return inside


def _is_target(item: RawObject) -> bool:
    return not item.ignore and not item.without_area


def _said(box: Box) -> str:
    return " ".join(f"{name}={value:g}" for name, value in zip(("x1", "y1", "x2", "y2"), box, strict=True))


def _xywh(box: Box) -> Box:
    return box[0], box[1], box[2] - box[0], box[3] - box[1]
