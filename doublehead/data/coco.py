"""COCO JSON: `<root>/annotations/instances_<split>.json`, images in `<root>/<split>` or `<root>/images/<split>`.

The split `train` also finds `instances_train2017.json` if that is the only year present.  Classes are the file's
categories by ascending id; ids may be any integers, in any order.  A test split, `image_info_<split>.json`, has no
boxes, and its images may be in the folder of another subset (test-dev2017 is part of test2017).  Boxes in the file are
x, y, width, height from the image's corner, and become (x, y, x + width, y + height).  `area`, `iscrowd` and `ignore`
of an annotation may be missing, and so may `height` and `width` of an image; 0 x 0 counts as missing.  An annotation
with `ignore` 1 is treated as a crowd.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from .coco_json import as_flag, as_number, as_side, id_of, is_id, load_coco, shown
from .files import RawImage, RawObject
from .names import clean_name, listed, not_a_class, shown_name, wrong_name
from .paths import check_inside
from .problems import ObjectError

Locate = Callable[[str, str], str]
"""From an image's `file_name`, and where it stands, to the path of its file; raises DataError."""


def is_coco(root: Path, split: str) -> bool:
    """Whether `read_coco` finds the split's file and the folder of its images."""
    try:
        return _image_folder(root, _find(root, split)[1]) is not None
    except DataError:
        return False


def read_coco(
    root: Path, split: str, classes: Sequence[str] | None = None, outside_root: bool = False
) -> tuple[list[str], list[int], Iterator[RawImage | DataError]]:
    """Class names, their category ids, and the images of a split; bad records are `DataError`s among the images.

    Args:
        classes: names to use, in this order, instead of the file's: those of a detector to evaluate.
        outside_root: allow a `file_name` outside the images' folder.

    Raises:
        DataError: a missing file or folder, invalid JSON, not a COCO file, a repeated category, an invalid class name.
    """
    path, split = _find(root, split)
    content = load_coco(path, has_boxes=path.name.startswith("instances_"))
    folder = _image_folder(root, split)
    if folder is None:
        raise DataError(f"{root / split}: no such folder, nor {root / 'images' / split}; the images of {path} are "
                        "looked for there", "missing folder")  # fmt: skip

    def locate(name: str, where: str) -> str:
        check_inside(name, where, outside_root)
        return str(folder / name)

    return read_coco_file(path, content, locate, classes)


def read_coco_file(
    path: Path, content: dict[str, list[Any]], locate: Locate, classes: Sequence[str] | None = None,
    unused: Collection[int] = (),
) -> tuple[list[str], list[int], Iterator[RawImage | DataError]]:  # fmt: skip
    """Class names, their category ids, and the images of one file; bad records are `DataError`s among the images.

    Args:
        path: the file's name, for messages.
        content: what `load_coco` has read from it.
        classes: names to use, in this order, instead of the file's.
        unused: ids of categories to leave out, which no annotation may have.

    Raises:
        DataError: a repeated category, an invalid class name.
    """
    entries = [entry for entry in content["categories"] if not (isinstance(entry, dict) and entry.get("id") in unused)]
    categories = _categories(entries, path)
    ids, names = list(categories), list(categories.values())
    if classes is not None:
        ids, names = ids_of(classes, categories), list(classes)
    return names, ids, _Reader(path, locate, categories, ids, names).images(content)


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


def _image_folder(root: Path, split: str) -> Path | None:
    subset = re.sub(r"-dev(?=\d{4}$)", "", split)
    folders = [parent / name for name in dict.fromkeys((split, subset)) for parent in (root, root / "images")]
    return next((path for path in folders if path.is_dir()), None)


def _categories(entries: list[Any], path: Path) -> dict[int, str]:
    """Category id -> name, by ascending id."""
    named: dict[int, str] = {}
    for position, entry in enumerate(entries):
        where = f"{path}, categories[{position}]"
        category, name = id_of(entry, where), entry.get("name")
        if not isinstance(name, str) or not name:
            raise DataError(f"{where}: name is {shown(name)}, a string is accepted", "malformed record")
        name = clean_name(name)
        if wrong_name(name):
            raise DataError(f"{where}: name {shown(entry['name'])} {wrong_name(name)}", "malformed record")
        if category in named or name in named.values():
            message = f"{where}: id {shown(category)} or name '{shown_name(name)}' occurs a second time"
            raise DataError(message, "duplicate category")
        named[category] = name
    if not named:
        raise DataError(f"{path}: no categories", "empty set")
    return dict(sorted(named.items()))


def ids_of(classes: Sequence[str], categories: dict[int, str]) -> list[int]:
    """The id of each class among `categories`, id -> name; a class that is not there gets a new one."""
    known = {name: category for category, name in categories.items()}
    new = iter(range(max(categories) + 1, max(categories) + 1 + len(classes)))
    taken: set[int] = set()
    ids = []
    for name in classes:
        category = known.get(clean_name(name))
        ids.append(next(new) if category is None or category in taken else category)
        taken.add(ids[-1])
    return ids


class _Reader:
    """Reads and checks the records of one file.

    Args:
        categories: id -> name, as in the file.
        ids, names: the data set's classes: label i is `ids[i - 1]`.
    """

    def __init__(self, path: Path, locate: Locate, categories: dict[int, str], ids: list[int], names: list[str]):
        self.path, self.locate = path, locate
        self.categories, self.names = categories, names
        self.labels = {category: label for label, category in enumerate(ids, 1)}

    def images(self, content: dict[str, list[Any]]) -> Iterator[RawImage | DataError]:
        annotations, errors = self._by_image(content)
        entries: list[tuple[str, dict[str, Any]]] = []
        for entry in self._numbered(content["images"]):  # first, because errors here leave annotations without an image
            if isinstance(entry, DataError):
                yield entry
            else:
                entries.append(entry)
        yield from errors.pop(None, [])
        for where, entry in entries:
            try:
                image = self._image(entry, where)
            except DataError as error:
                yield error
                continue
            image.errors += errors.pop(image.image_id, [])
            for source, annotation in annotations.pop(image.image_id, []):
                try:
                    image.objects.append(self._object(annotation, source))
                except DataError as error:
                    image.errors.append(error)
            yield image

    def _numbered(self, images: list[Any]) -> Iterator[tuple[str, dict[str, Any]] | DataError]:
        """The images with a unique id, each with its position in the file; errors for the others."""
        seen: set[int] = set()
        for position, entry in enumerate(images):
            where = f"{self.path}, images[{position}]"
            try:
                image_id = id_of(entry, where)
                if image_id in seen:
                    raise DataError(f"{where}: id {shown(image_id)} occurs a second time", "duplicate image id")
            except DataError as error:
                yield error
                continue
            seen.add(image_id)
            yield where, entry

    def _by_image(
        self, content: dict[str, list[Any]]
    ) -> tuple[dict[int, list[tuple[str, Any]]], dict[int | None, list[DataError]]]:
        """Annotations by image id, each with its position in the file; and errors by image id (None: unknown)."""
        found: dict[int, list[tuple[str, Any]]] = {}
        errors: dict[int | None, list[DataError]] = {}
        images = {entry.get("id") for entry in content["images"] if isinstance(entry, dict) and is_id(entry.get("id"))}
        seen: set[int] = set()
        for position, entry in enumerate(content["annotations"]):
            image = entry.get("image_id") if isinstance(entry, dict) else None
            try:
                number = id_of(entry, f"{self.path}, annotations[{position}]")
                where = f"{self.path}, annotation {shown(number)}"
                if number in seen:
                    raise DataError(f"{where}: this id occurs a second time", "duplicate annotation id")
                if not is_id(image) or image not in images:
                    raise DataError(f"{where}: image_id {shown(image)} is not among the images", "unknown image")
            except DataError as error:
                owner = image if is_id(image) and image in images else None
                errors.setdefault(owner, []).append(ObjectError(str(error), error.reason))
                continue
            seen.add(number)
            found.setdefault(image, []).append((where, entry))
        return found, errors

    def _image(self, entry: dict[str, Any], where: str) -> RawImage:
        image_id = entry["id"]
        name, height, width = (entry.get(key) for key in ("file_name", "height", "width"))
        if not isinstance(name, str) or not name:
            raise DataError(f"{where}: file_name is {shown(name)}, a string is accepted", "malformed record")
        file = self.locate(name, f"{where}: file_name")
        sides = as_side(height), as_side(width)
        if sides == (0, 0):
            return RawImage(image_id, name, file, None)
        if not (sides[0] and sides[1]):
            message = f"{where}: height, width are {shown(height)}, {shown(width)}; positive integers are accepted"
            raise DataError(message, "malformed record")
        return RawImage(image_id, name, file, sides)

    def _object(self, entry: dict[str, Any], where: str) -> RawObject:
        label = self._label(entry.get("category_id"), where)
        box = entry.get("bbox")
        numbers = [as_number(value) for value in box] if isinstance(box, list) else []
        if len(numbers) != 4 or None in numbers:
            raise DataError(f"{where}: bbox is {shown(box)}, [x, y, width, height] is accepted", "malformed box")
        area = as_number(entry.get("area"))
        if entry.get("area") is not None and not (area is not None and 0 <= area < float("inf")):
            message = f"{where}: area is {shown(entry['area'])}, a number >= 0 is accepted"
            raise DataError(message, "malformed record")
        for key in ("iscrowd", "ignore"):
            if as_flag(entry.get(key)) is None:
                raise DataError(f"{where}: {key} is {shown(entry[key])}, 0 or 1 is accepted", "malformed record")
        ignore = bool(as_flag(entry.get("iscrowd")) or as_flag(entry.get("ignore")))
        x, y, width, height = numbers
        return RawObject(where, entry["id"], label, (x, y, x + width, y + height), ignore, (x, y, width, height), area)

    def _label(self, category: Any, where: str) -> int:
        if is_id(category) and category in self.labels and category in self.categories:
            return self.labels[category]
        if is_id(category) and category in self.categories:
            name = self.categories[category]
            message = (f"{where}: category_id {shown(category)}: {not_a_class(name, self.names)}; "
                       f"the file's are {listed(self.categories.values())}")  # fmt: skip
        else:
            message = f"{where}: category_id {shown(category)} is not among the categories"
        raise DataError(message, "unknown category")
