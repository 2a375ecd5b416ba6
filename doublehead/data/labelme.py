"""LabelMe's JSON: one file for each picture, with rectangles, polygons and other shapes.

Points are pixels between pixel edges, as boxes are here: a rectangle's two corners, in any order, are x1, y1, x2, y2.
A polygon, a circle or a mask becomes the box around it.  Shapes of one label with the same `group_id` are the parts of
one object, as in LabelMe's own converters.  Points and lines have no box: they are left out and counted.  `imageData`
is not used.  Points are those of the picture shown upright (a JPEG's EXIF orientation applied), unless the size that
the file states is that of the stored one alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from .coco_json import as_number, as_side, shown
from .files import Box, RawImage, RawObject
from .names import clean_name, not_a_class, wrong_name
from .paths import check_regular

AROUND_POINTS = {"rectangle": 2, "polygon": 3, "mask": 2, "rotation": 3, "quadrilateral": 4}
"""Kind of shape -> the least number of points; its box is the one around them."""
WITHOUT_BOX = frozenset(("point", "points", "line", "linestrip"))
Locate = Callable[[str, Path], Path]
"""From `imagePath`, and the file in which it stands, to the picture's path; raises DataError."""


def read_labelme(
    files: Sequence[tuple[str, Path]], locate: Locate, all_files: Iterable[Path], classes: Sequence[str] | None = None
) -> tuple[list[str], list[int], Iterator[RawImage | DataError]]:
    """Class names, category ids (1, 2, ...), and the images; bad records are `DataError`s among the images.

    Args:
        files: (name of the picture for results, JSON file) of each.
        all_files: the files in which to look for classes: those of every split.
        classes: names to use, in this order, instead of those found, which are sorted.
    """
    found = list(classes) if classes is not None else _find_classes(all_files)
    labels = {clean_name(name): label for label, name in enumerate(found, 1)}
    return found, list(range(1, len(found) + 1)), _images(files, locate, labels)


def load_labelme(path: Path) -> dict[str, Any]:
    """The file's contents, in which `shapes` is a list of objects.

    Raises:
        DataError: it cannot be read, or is not LabelMe's.
    """
    check_regular(path, "annotation")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: invalid JSON: {error}", "invalid JSON") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}", "missing file") from error
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise DataError(f"{path}: no list 'shapes' at the top level: not LabelMe's annotation", "invalid JSON")
    return content


def _find_classes(files: Iterable[Path]) -> list[str]:
    names: set[str] = set()
    for path in files:
        try:
            shapes = load_labelme(path)["shapes"]
        except DataError:
            continue  # a broken file has no classes; its split reports it
        names.update(_label(shape) for shape in shapes if isinstance(shape, dict) and _kind(shape) not in WITHOUT_BOX)
    return sorted(name for name in names if not wrong_name(name))


def _images(
    files: Sequence[tuple[str, Path]], locate: Locate, labels: dict[str, int]
) -> Iterator[RawImage | DataError]:
    objects = 0
    for number, (name, path) in enumerate(files, 1):
        try:
            content = load_labelme(path)
            file = str(locate(_image_path(content, path), path))
            image = RawImage(number, name, file, _size(content, path), shown_upright=True)
        except DataError as error:
            yield error
            continue
        groups: dict[tuple[str, Any], RawObject] = {}
        shapes = content["shapes"]
        for position, shape in enumerate(shapes, 1):
            try:
                where = f"{path}, shape {position} of {len(shapes)}"
                if isinstance(shape, dict) and _kind(shape) in WITHOUT_BOX:
                    image.left_out["point or line"] += 1
                    continue
                item = _object(shape, where, objects + 1, labels)
            except DataError as error:
                image.errors.append(error)
                continue
            group = shape.get("group_id")
            first = groups.get((_label(shape), group)) if isinstance(group, (int, str)) else None
            if first is not None:
                first.box = _joined(first.box, item.box)
                continue
            objects += 1
            image.objects.append(item)
            if isinstance(group, (int, str)):
                groups[_label(shape), group] = item
        yield image


def _image_path(content: dict[str, Any], path: Path) -> str:
    name = content.get("imagePath")
    if not isinstance(name, str) or not name:
        raise DataError(f"{path}: imagePath is {shown(name)}, a string is accepted", "malformed record")
    return name


def _size(content: dict[str, Any], path: Path) -> tuple[int, int] | None:
    sides = as_side(content.get("imageHeight")), as_side(content.get("imageWidth"))
    if sides == (0, 0):
        return None
    if not (sides[0] and sides[1]):
        said = f"{shown(content.get('imageHeight'))}, {shown(content.get('imageWidth'))}"
        message = f"{path}: imageHeight, imageWidth are {said}; positive integers are accepted"
        raise DataError(message, "malformed record")
    return sides[0], sides[1]


def _object(shape: Any, where: str, number: int, labels: dict[str, int]) -> RawObject:
    if not isinstance(shape, dict):
        raise DataError(f"{where}: is {shown(shape)}, an object is accepted", "malformed record")
    name = _label(shape)
    if name not in labels:
        wrong = wrong_name(name)
        message = f"label {shown(shape.get('label'))} {wrong}" if wrong else not_a_class(name, list(labels))
        raise DataError(f"{where}: {message}", "unknown category")
    where = f"{where} ({name})"
    points = shape.get("points")
    pairs = [_point(point) for point in points] if isinstance(points, list) else []
    if not pairs or None in pairs:
        raise DataError(f"{where}: points are {shown(points)}, [[x, y], ...] is accepted", "malformed box")
    return RawObject(where, number, labels[name], _box(_kind(shape), pairs, where), shape.get("difficult") is True)


def _box(kind: str, points: list[tuple[float, float]], where: str) -> Box:
    if kind == "circle" and len(points) == 2:
        (x, y), (edge_x, edge_y) = points
        radius = math.hypot(edge_x - x, edge_y - y)
        return x - radius, y - radius, x + radius, y + radius
    least = AROUND_POINTS.get(kind)
    if least is None:
        known = ", ".join(("circle", *AROUND_POINTS))
        raise DataError(f"{where}: shape_type {shown(kind)} with {len(points)} points; {known} are accepted",
                        "malformed box")  # fmt: skip
    if len(points) < least:
        raise DataError(f"{where}: a {kind} of {len(points)} points; at least {least} are accepted", "malformed box")
    columns = list(zip(*points, strict=True))
    if any(math.isnan(value) for column in columns for value in column):
        return math.nan, math.nan, math.nan, math.nan
    return min(columns[0]), min(columns[1]), max(columns[0]), max(columns[1])


def _point(point: Any) -> tuple[float, float] | None:
    numbers = [as_number(value) for value in point] if isinstance(point, list) else []
    return (numbers[0], numbers[1]) if len(numbers) == 2 and None not in numbers else None


def _joined(one: Box, other: Box) -> Box:
    return min(one[0], other[0]), min(one[1], other[1]), max(one[2], other[2]), max(one[3], other[3])


def _kind(shape: dict[str, Any]) -> str:
    kind = shape.get("shape_type")
    return kind if isinstance(kind, str) else "polygon" if kind is None else shown(kind)  # old files have no kinds


def _label(shape: dict[str, Any]) -> str:
    label = shape.get("label")
    return clean_name(label) if isinstance(label, str) else ""
