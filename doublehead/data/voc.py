"""Pascal VOC folders: `JPEGImages`, `Annotations`, `ImageSets/Main/<split>.txt` (one image name a line).

Pixel convention: VOC counts pixels from 1, and boxes include their last pixel.  (xmin, ymin, xmax, ymax) becomes
(xmin - 1, ymin - 1, xmax, ymax) between pixel edges: a box over the whole image, (1, 1, W, H), becomes (0, 0, W, H).
xmin = 0, from tools that count from 0, is one pixel outside the image: the box is clipped and counted.  xmin = xmax
would be one column of pixels; real objects are wider, so it is treated as a mistake and becomes a box of zero width.

Classes are all names in `Annotations`, sorted, which are the same for every split.  Image ids are line numbers of the
split's list, even if records are skipped.  A `<size>` that is empty or 0 x 0, from tools that could not read the image,
counts as missing.  `<filename>` and `<path>` are not used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

from ..errors import DataError
from .coco_json import MAX_SIDE
from .files import MIN_SIDE, RawImage, RawObject
from .names import clean_name, not_a_class, shown_name, wrong_name
from .numbers import as_written
from .paths import check_inside
from .xml import read_annotation

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
"""The classes of VOC itself; earlier versions used all of them for data that name only some."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG", ".bmp", ".webp", ".BMP", ".tif", ".tiff", ".TIF")
"""Suffixes of image files; the first that exists is used."""


def is_voc(root: Path, split: str) -> bool:
    """Whether `read_voc` finds the split's list."""
    return (root / "ImageSets" / "Main" / f"{split}.txt").is_file()


def read_voc(
    root: Path, split: str, classes: Sequence[str] | None = None, outside_root: bool = False
) -> tuple[list[str], list[int], Iterator[RawImage | DataError]]:
    """Class names, category ids (1, 2, ...), and the images of a split; bad records are `DataError`s among the images.

    Args:
        classes: names to use, in this order: those of a detector to evaluate.
        outside_root: allow a name in the list that leads out of the folders.

    Raises:
        DataError: a folder or the list is missing, or the list is not text.
    """
    listing = root / "ImageSets" / "Main" / f"{split}.txt"
    if not listing.is_file():
        known = ", ".join(sorted(path.stem for path in listing.parent.glob("*.txt"))) or "none"
        raise DataError(f"{listing}: no such file; splits there: {known}", "missing file")
    for folder in ("Annotations", "JPEGImages"):
        if not (root / folder).is_dir():
            raise DataError(f"{root / folder}: no such folder", "missing folder")
    folders = root / "JPEGImages", root / "Annotations"
    return read_xml(listed_names(listing), *folders, [root / "Annotations"], classes, outside_root)


def listed_names(listing: Path) -> list[tuple[int, str, str]]:
    """A list's (image id, name of an image, where it stands), one for each line that is not empty.

    Raises:
        DataError: it is not text.
    """
    try:
        lines = listing.read_text("utf-8-sig").splitlines()
    except ValueError as error:
        raise DataError(f"{listing}: not a text file in UTF-8: {error}", "malformed record") from error
    names = enumerate(map(clean_name, lines), 1)
    return [(line, name, f"{listing}, line {line}") for line, name in names if name]


def read_xml(
    listed: Iterable[tuple[int, str, str]], images: Path, annotations: Path, all_annotations: Sequence[Path],
    classes: Sequence[str] | None = None, outside_root: bool = False,
) -> tuple[list[str], list[int], Iterator[RawImage | DataError]]:  # fmt: skip
    """As `read_voc`, of images by name.

    Args:
        listed: (image id, name, where it stands) of each image.
        images, annotations: the folders of NAME.jpg and NAME.xml.
        all_annotations: the folders in which to look for classes: those of every split.
    """
    found = list(classes) if classes is not None else _find_classes(all_annotations)
    labels = {clean_name(name): label for label, name in enumerate(found, 1)}
    return found, list(range(1, len(found) + 1)), _images(listed, images, annotations, labels, outside_root)


def _find_classes(folders: Iterable[Path]) -> list[str]:
    names: set[str] = set()
    for path in (path for folder in folders for path in folder.glob("*.xml")):
        try:
            names.update(_text(item, "name") for item in read_annotation(path).findall("object"))
        except DataError:
            continue  # a broken file has no classes; its split reports it
    return sorted(name for name in names if not wrong_name(name))


def _images(
    listed: Iterable[tuple[int, str, str]], images: Path, annotations: Path, labels: dict[str, int], outside_root: bool
) -> Iterator[RawImage | DataError]:
    seen: set[str] = set()
    objects = 0
    for number, name, where in listed:
        try:
            if name in seen:
                raise DataError(f"{where}: {name[:200]!r} occurs a second time", "duplicate image id")
            check_inside(name, where, outside_root)
            image_path = _image_path(images, name, where)
            path = annotations / f"{name}.xml"
            tree = read_annotation(path)
            image = RawImage(number, image_path.name, str(image_path), _size(tree, path))
        except DataError as error:
            yield error
            continue
        seen.add(name)
        entries = tree.findall("object")
        for position, entry in enumerate(entries, 1):
            objects += 1
            try:
                where = f"{path}, object {position} of {len(entries)} ({shown_name(_text(entry, 'name'))})"
                image.objects.append(_object(entry, where, objects, labels))
            except DataError as error:
                image.errors.append(error)
        yield image


def _image_path(folder: Path, name: str, where: str) -> Path:
    for suffix in SUFFIXES:
        path = folder / (name + suffix)
        try:
            if path.is_file():
                return path
        except OSError:  # not a valid file name, such as one that is too long
            break
    message = f"{where}: no image {folder / name[:200]} with one of the suffixes {' '.join(SUFFIXES)}"
    raise DataError(message, "missing image")


def _size(tree: Element, path: Path) -> tuple[int, int] | None:
    """(height, width); None if the file does not state it."""
    size = tree.find("size")
    said = [_text(size, key) if size is not None else "" for key in ("height", "width")]
    try:
        sides = [as_written(text) if text else 0.0 for text in said]
    except ValueError as error:
        raise DataError(f"{path}, size: {error}", "malformed record") from error
    if sides == [0, 0]:
        return None
    if not all(0 < side <= MAX_SIDE and side == int(side) for side in sides):
        message = f"{path}, size: height, width are '{said[0][:40]}', '{said[1][:40]}'; positive integers are accepted"
        raise DataError(message, "malformed record")
    return int(sides[0]), int(sides[1])


def _object(entry: Element, where: str, number: int, labels: dict[str, int]) -> RawObject:
    for key in ("name", "bndbox", "difficult"):
        if len(entry.findall(key)) > 1:
            raise DataError(f"{where}: {len(entry.findall(key))} elements <{key}>, one is accepted", "malformed record")
    name, difficult, corners = _text(entry, "name"), _text(entry, "difficult"), entry.find("bndbox")
    if name not in labels:
        wrong = wrong_name(name)
        message = f"{where}: name {name[:80]!r} {wrong}" if wrong else f"{where}: {not_a_class(name, list(labels))}"
        raise DataError(message, "unknown category")
    if difficult not in ("", "0", "1"):
        raise DataError(f"{where}: difficult is {difficult[:40]!r}, 0 or 1 is accepted", "malformed record")
    try:
        if corners is None:
            children = ", ".join(f"<{child.tag}>" for child in entry) or "none"
            raise ValueError(f"no bndbox, its elements are {children[:200]}")
        x1, y1, x2, y2 = (_corner(corners, key) for key in ("xmin", "ymin", "xmax", "ymax"))
    except ValueError as error:
        raise DataError(f"{where}: bndbox: {error}", "malformed box") from error
    if x2 < x1 or y2 < y1:
        said = f"xmin={x1:g} ymin={y1:g} xmax={x2:g} ymax={y2:g}"
        raise DataError(f"{where}: degenerate box {said}; xmin < xmax and ymin < ymax are accepted", "degenerate box")
    left, top = (x1 - 1 if x2 - x1 >= MIN_SIDE else x1), (y1 - 1 if y2 - y1 >= MIN_SIDE else y1)
    return RawObject(where, number, labels[name], (left, top, x2, y2), difficult == "1")


def _corner(corners: Element, key: str) -> float:
    if len(corners.findall(key)) != 1:
        raise ValueError(f"{len(corners.findall(key))} elements <{key}>, one is accepted")
    return as_written(_text(corners, key))


def _text(element: Element, key: str) -> str:
    return clean_name(element.findtext(key) or "")
