"""COCO JSON: `<root>/annotations/instances_<split>.json`, images in `<root>/<split>` or `<root>/images/<split>`.

The split `train` also finds `instances_train2017.json` where that is the only year present.  Classes are the file's
categories by ascending id; ids may be sparse.  A test split has no boxes: `image_info_<split>.json`, and its images may
lie in the folder of another subset (test-dev2017 is part of test2017).  Boxes are x, y, width, height from the image's
corner: here (x, y, x + width, y + height).  `height` and `width` of an image, `area` and `iscrowd` of an annotation may
be missing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .dataset import DataError
from .files import RawImage, RawObject


def read_coco(
    root: Path, split: str, classes: Sequence[str] | None = None
) -> tuple[list[str], list[int], Iterator[RawImage | DataError]]:
    """Class names, their category ids, and the images of a split, bad records among them as `DataError`.

    Args:
        classes: these names, in this order, instead of the file's: a detector's, when it is to be evaluated.

    Raises:
        DataError: file or folder missing, invalid JSON, not a COCO file, repeated category.
    """
    path, split = _find(root, split)
    content = _load(path, has_boxes=path.name.startswith("instances_"))
    subset = re.sub(r"-dev(?=\d{4}$)", "", split)
    places = [place / name for name in dict.fromkeys((split, subset)) for place in (root, root / "images")]
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        raise DataError(f"{root / split}: no such folder, nor {root / 'images' / split}; the images of {path} are "
                        "looked for there", "missing folder")  # fmt: skip
    ids, names = _categories(content["categories"], path)
    if classes is not None:
        ids, names = _ids_of(classes, ids, names), list(classes)
    labels = {category: label for label, category in enumerate(ids, 1)}
    return names, ids, _images(content, path, folder, labels)


def _find(root: Path, split: str) -> tuple[Path, str]:
    folder = root / "annotations"
    found = sorted(path.stem.removeprefix("instances_") for path in folder.glob("instances_*.json"))
    if split not in found and (folder / f"image_info_{split}.json").is_file():
        return folder / f"image_info_{split}.json", split
    if split not in found:
        years = [name for name in found if re.fullmatch(re.escape(split) + r"\d{4}", name)]
        if len(years) != 1:
            known = ", ".join(found) or "none"
            message = f"{folder / f'instances_{split}.json'}: no such file; splits there: {known}"
            raise DataError(message, "missing file")
        split = years[0]
    return folder / f"instances_{split}.json", split


def _load(path: Path, has_boxes: bool = True) -> dict[str, list[Any]]:
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # JSONDecodeError tells line and column
        raise DataError(f"{path}: invalid JSON: {error}", "invalid JSON") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}", "missing file") from error
    if not has_boxes and isinstance(content, dict):
        content.setdefault("annotations", [])
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{path}: no list '{key}' at the top level: not COCO instances", "invalid JSON")
    return content


def _categories(entries: list[Any], path: Path) -> tuple[list[int], list[str]]:
    named: dict[int, str] = {}
    for position, entry in enumerate(entries):
        where = f"{path}, categories[{position}]"
        category, name = _id_of(entry, where), entry.get("name")
        if not isinstance(name, str) or not name:
            raise DataError(f"{where}: name is {name!r}, a string is accepted", "malformed record")
        if category in named or name in named.values():
            raise DataError(f"{where}: id {category} or name '{name}' occurs a second time", "duplicate category")
        named[category] = name
    if not named:
        raise DataError(f"{path}: no categories", "empty set")
    ids = sorted(named)
    return ids, [named[i] for i in ids]


def _ids_of(classes: Sequence[str], ids: list[int], names: list[str]) -> list[int]:
    """The file's id of each class; a class that the file does not know gets a new one."""
    known = dict(zip(names, ids, strict=True))
    new = iter(range(max(ids) + 1, max(ids) + 1 + len(classes)))
    return [known[name] if name in known else next(new) for name in classes]


def _images(
    content: dict[str, list[Any]], path: Path, folder: Path, labels: dict[int, int]
) -> Iterator[RawImage | DataError]:
    annotations, errors = _by_image(content, path)
    yield from errors
    seen: set[int] = set()
    for position, entry in enumerate(content["images"]):
        try:
            image = _image(entry, f"{path}, images[{position}]", folder)
            if image.image_id in seen:
                raise DataError(f"{path}, images[{position}]: id {image.image_id} occurs a second time",
                                "duplicate image id")  # fmt: skip
        except DataError as error:
            yield error
            continue
        seen.add(image.image_id)
        for where, annotation in annotations.pop(image.image_id, []):
            try:
                image.objects.append(_object(annotation, where, labels))
            except DataError as error:
                image.errors.append(error)
        yield image


def _by_image(content: dict[str, list[Any]], path: Path) -> tuple[dict[int, list[tuple[str, Any]]], list[DataError]]:
    """Annotations by image id, each with its place in the file; and an error for each that has no image of its own."""
    found: dict[int, list[tuple[str, Any]]] = {}
    errors: list[DataError] = []
    images = {entry.get("id") for entry in content["images"] if isinstance(entry, dict) and _is_id(entry.get("id"))}
    seen: set[int] = set()
    for position, entry in enumerate(content["annotations"]):
        try:
            number = _id_of(entry, f"{path}, annotations[{position}]")
            where = f"{path}, annotation {number}"
            image = entry.get("image_id")
            if number in seen:
                raise DataError(f"{where}: this id occurs a second time", "duplicate annotation id")
            if not _is_id(image) or image not in images:
                raise DataError(f"{where}: image_id {image!r} is not among the images", "unknown image")
        except DataError as error:
            errors.append(error)
            continue
        seen.add(number)
        found.setdefault(image, []).append((where, entry))
    return found, errors


def _image(entry: Any, where: str, folder: Path) -> RawImage:
    image_id = _id_of(entry, where)
    name, height, width = (entry.get(key) for key in ("file_name", "height", "width"))
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: file_name is {name!r}, a string is accepted", "malformed record")
    if height is None and width is None:
        return RawImage(image_id, name, str(folder / name), None)
    if not (_is_id(height) and _is_id(width) and height > 0 and width > 0):
        message = f"{where}: height, width are {height!r}, {width!r}; positive integers are accepted"
        raise DataError(message, "malformed record")
    return RawImage(image_id, name, str(folder / name), (height, width))


def _object(entry: dict[str, Any], where: str, labels: dict[int, int]) -> RawObject:
    category, box, area, crowd = (entry.get(key) for key in ("category_id", "bbox", "area", "iscrowd"))
    if not _is_id(category) or category not in labels:
        raise DataError(f"{where}: category_id {category!r} is not among the categories", "unknown category")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise DataError(f"{where}: bbox is {box!r}, [x, y, width, height] is accepted", "malformed box")
    if area is not None and not (_is_number(area) and 0 <= area < float("inf")):
        raise DataError(f"{where}: area is {area!r}, a number >= 0 is accepted", "malformed record")
    if crowd not in (None, 0, 1):
        raise DataError(f"{where}: iscrowd is {crowd!r}, 0 or 1 is accepted", "malformed record")
    x, y, width, height = (float(value) for value in box)
    return RawObject(where, entry["id"], labels[category], (x, y, x + width, y + height), bool(crowd),
                     (x, y, width, height), None if area is None else float(area))  # fmt: skip


def _id_of(entry: Any, where: str) -> int:
    number = entry.get("id") if isinstance(entry, dict) else None
    if not _is_id(number):
        raise DataError(f"{where}: id is {number!r}, an integer is accepted", "malformed record")
    return number


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
