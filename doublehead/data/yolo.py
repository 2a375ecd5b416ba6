"""YOLO's label files: one line for each object, `class x y width height` as shares of the image's sides, or a polygon.

The centre and size become corners between pixel edges: x1 = (x - width / 2) * W.  W and H are those of the image shown
upright (a JPEG's EXIF orientation applied), as the tools that write such files see it.  Labels have few decimals, so a
corner at most `ROUNDED` of a side outside the image is put on its border without a note.  A polygon (`class x1 y1 x2 y2
x3 y3 ...`) becomes the box around it.  An empty label file is an image without objects, and so is a missing one.
Category ids are the label files' own numbers of the classes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ..errors import DataError
from .coco import ids_of
from .files import Box, RawImage, RawObject
from .images import upright_size
from .names import clean_name, not_a_class, shown_name, wrong_name
from .numbers import as_written
from .paths import check_regular

ROUNDED = 1e-5
"""The share of a side by which rounding may move a corner over the border."""
PIXELS = 2.0
"""Shares beyond this are no shares, but pixels."""


def read_yolo(
    images: Sequence[tuple[str, Path]], label_file: Callable[[Path], Path], names: Mapping[int, str],
    classes: Sequence[str] | None = None, key_points: bool = False,
) -> tuple[list[str], list[int], Iterator[RawImage | DataError]]:  # fmt: skip
    """Class names, category ids, and the images; bad records are `DataError`s among the images.

    Args:
        images: (name for results, path) of each image.
        label_file: from an image's path to its label file's.
        names: the label files' numbers of classes -> name.
        classes: names to use, in this order, instead of these.
        key_points: lines have key points after the box (a pose set), not polygons.
    """
    ids, found = list(names), list(names.values())
    if classes is not None:
        ids, found = ids_of(classes, dict(names)), list(classes)
    reader = _Reader(names, {clean_name(name): label for label, name in enumerate(found, 1)}, key_points)
    return found, ids, reader.images(images, label_file)


class _Reader:
    def __init__(self, names: Mapping[int, str], labels: dict[str, int], key_points: bool):
        self.names, self.labels, self.key_points = names, labels, key_points
        self.objects = 0

    def images(
        self, images: Sequence[tuple[str, Path]], label_file: Callable[[Path], Path]
    ) -> Iterator[RawImage | DataError]:
        for number, (name, path) in enumerate(images, 1):
            try:
                lines = _lines(label_file(path))
                height, width = upright_size(path) if lines else (0, 0)
            except DataError as error:
                yield error
                continue
            image = RawImage(number, name, str(path), (height, width) if lines else None, shown_upright=True)
            for where, line in lines:
                self.objects += 1
                try:
                    image.objects.append(self._object(line, where, width, height))
                except DataError as error:
                    image.errors.append(error)
            yield image

    def _object(self, line: str, where: str, width: int, height: int) -> RawObject:
        words = line.split()
        try:
            index, *values = map(as_written, words)
        except ValueError as error:
            raise DataError(f"{where}: {error}; 'class x y width height' is accepted", "malformed box") from error
        label = self._label(index, words[0], where)
        if any(abs(value) > PIXELS for value in values[: 4 if self.key_points else None]):
            shown = f"{line[:60]!r}"
            message = f"{where}: {shown} is not in shares of the image's sides, 0 to 1; it seems to be in pixels"
            raise DataError(message, "malformed box")
        if self.key_points or len(values) == 4:
            box = _around_centre(values[:4], where)
        elif len(values) >= 6 and len(values) % 2 == 0:
            box = min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
        else:
            kind = "; a detector's result with scores?" if len(values) == 5 else ""
            raise DataError(f"{where}: {len(words)} numbers, 5 (class x y width height) or a polygon of 3 or more "
                            f"points are accepted{kind}", "malformed box")  # fmt: skip
        x1, y1, x2, y2 = map(_at_border, box)
        return RawObject(where, self.objects, label, (x1 * width, y1 * height, x2 * width, y2 * height))

    def _label(self, index: float, word: str, where: str) -> int:
        name = self.names.get(int(index)) if index == index and abs(index) < 1e9 and index == int(index) else None
        if name is None:
            known = f"{min(self.names)} to {max(self.names)}"
            raise DataError(f"{where}: class {word[:40]} has no name, those of {known} have one", "unknown category")
        if name not in self.labels:
            raise DataError(f"{where}: class {word[:40]}: {not_a_class(name, list(self.labels))}", "unknown category")
        return self.labels[name]


def _around_centre(values: Sequence[float], where: str) -> Box:
    if len(values) != 4:
        raise DataError(f"{where}: {len(values)} numbers after the class, at least 4 are accepted", "malformed box")
    x, y, width, height = values
    if width < 0 or height < 0:
        message = f"{where}: width, height are {width:g}, {height:g}; at least 0 is accepted"
        raise DataError(message, "degenerate box")
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _at_border(share: float) -> float:
    if -ROUNDED <= share <= 0:
        return 0.0
    return 1.0 if 1 <= share <= 1 + ROUNDED else share


def _lines(path: Path) -> list[tuple[str, str]]:
    """(where it stands, text) of each line that is not empty; none if there is no file."""
    if not os.path.lexists(path):
        return []
    check_regular(path, "annotation")
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except ValueError as error:
        raise DataError(f"{path}: not a text file in UTF-8: {error}", "malformed record") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}", "missing annotation file") from error
    return [(f"{path}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]


def check_names(names: Mapping[int, str], where: str) -> dict[int, str]:
    """The names cleaned, by ascending number.

    Raises:
        DataError: there are none, one is not valid, or one occurs twice.
    """
    cleaned: dict[int, str] = {}
    for number, name in sorted(names.items()):
        name = clean_name(name)
        if wrong_name(name):
            raise DataError(f"{where}: class {number}: name {name[:80]!r} {wrong_name(name)}", "malformed record")
        if name in cleaned.values():
            raise DataError(f"{where}: the class '{shown_name(name)}' occurs a second time", "duplicate category")
        cleaned[number] = name
    if not cleaned:
        raise DataError(f"{where}: no classes", "empty set")
    return cleaned
