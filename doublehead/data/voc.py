"""Pascal VOC folders: `JPEGImages`, `Annotations`, `ImageSets/Main/<split>.txt` (one image name a line).

Pixel convention: VOC counts pixels from 1 and its boxes include their last pixel.  (xmin, ymin, xmax, ymax) becomes
(xmin - 1, ymin - 1, xmax, ymax) between pixel edges: a box over the whole image, (1, 1, W, H), is (0, 0, W, H).
xmin = 0, which tools that count from 0 write, reaches one pixel over the border: it is clipped, and counted.
xmin = xmax would be one column of pixels; no such object exists, so it is taken for a slip and is degenerate.

Classes are the twenty of VOC where they suffice; else the names that occur in `Annotations`, sorted: in every split the
same.  Image ids are line numbers of the split's list, whatever is skipped.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path

from .dataset import DataError
from .files import RawImage, RawObject

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG", ".bmp", ".webp")
"""Of the images; the first that exists is taken."""


def read_voc(
    root: Path, split: str, classes: Sequence[str] | None = None
) -> tuple[list[str], list[int], Iterator[RawImage | DataError]]:
    """Class names, category ids (1, 2, ...), and the images of a split, bad records among them as `DataError`.

    Args:
        classes: these names, in this order: a detector's, when it is to be evaluated.

    Raises:
        DataError: folder or list missing, or the list is not text.
    """
    listing = root / "ImageSets" / "Main" / f"{split}.txt"
    if not listing.is_file():
        known = ", ".join(sorted(path.stem for path in listing.parent.glob("*.txt"))) or "none"
        raise DataError(f"{listing}: no such file; splits there: {known}", "missing file")
    for folder in ("Annotations", "JPEGImages"):
        if not (root / folder).is_dir():
            raise DataError(f"{root / folder}: no such folder", "missing folder")
    try:
        names = listing.read_text("utf-8-sig").splitlines()
    except ValueError as error:
        raise DataError(f"{listing}: not a text file in UTF-8: {error}", "malformed record") from error
    found = list(classes) if classes is not None else _find_classes(root / "Annotations")
    labels = {name: label for label, name in enumerate(found, 1)}
    return found, list(range(1, len(found) + 1)), _images(root, listing, names, labels)


def _find_classes(folder: Path) -> list[str]:
    names: set[str] = set()
    for path in folder.glob("*.xml"):
        try:
            names.update(_text(item, "name") for item in ElementTree.parse(path).getroot().findall("object"))
        except (ElementTree.ParseError, ValueError, LookupError, OSError):
            continue  # a broken file names no class; the split it belongs to reports it
    names.discard("")
    return list(VOC_CLASSES) if names <= set(VOC_CLASSES) else sorted(names)


def _images(root: Path, listing: Path, names: list[str], labels: dict[str, int]) -> Iterator[RawImage | DataError]:
    seen: set[str] = set()
    objects = 0
    for line, name in enumerate(map(str.strip, names), 1):
        if not name:
            continue
        try:
            if name in seen:
                raise DataError(f"{listing}, line {line}: '{name}' occurs a second time", "duplicate image id")
            image_path = _image_path(root, name, f"{listing}, line {line}")
            path = root / "Annotations" / f"{name}.xml"
            tree = _parse(path)
            image = RawImage(line, image_path.name, str(image_path), _size(tree, path))
        except DataError as error:
            yield error
            continue
        seen.add(name)
        entries = tree.findall("object")
        for position, entry in enumerate(entries, 1):
            objects += 1
            try:
                where = f"{path}, object {position} of {len(entries)} ({_text(entry, 'name')})"
                image.objects.append(_object(entry, where, objects, labels))
            except DataError as error:
                image.errors.append(error)
        yield image


def _image_path(root: Path, name: str, where: str) -> Path:
    for suffix in SUFFIXES:
        path = root / "JPEGImages" / (name + suffix)
        if path.is_file():
            return path
    message = f"{where}: no image {root / 'JPEGImages' / name} with one of the suffixes {' '.join(SUFFIXES)}"
    raise DataError(message, "missing image")


def _parse(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such annotation file", "missing annotation file") from error
    except (ElementTree.ParseError, ValueError, LookupError, OSError) as error:  # ParseError tells line and column
        raise DataError(f"{path}: invalid XML: {error}", "invalid XML") from error


def _size(tree: ElementTree.Element, path: Path) -> tuple[int, int] | None:
    size = tree.find("size")
    if size is None:
        return None
    try:
        return int(_text(size, "height")), int(_text(size, "width"))
    except ValueError as error:
        raise DataError(f"{path}, size: {error}", "malformed record") from error


def _object(entry: ElementTree.Element, where: str, number: int, labels: dict[str, int]) -> RawObject:
    name, difficult, corners = _text(entry, "name"), _text(entry, "difficult"), entry.find("bndbox")
    if name not in labels:
        raise DataError(f"{where}: name '{name}' is not among the classes {', '.join(labels)}", "unknown category")
    if difficult not in ("", "0", "1"):
        raise DataError(f"{where}: difficult is '{difficult}', 0 or 1 is accepted", "malformed record")
    try:
        if corners is None:
            raise ValueError("no bndbox")
        x1, y1, x2, y2 = (float(_text(corners, key)) for key in ("xmin", "ymin", "xmax", "ymax"))
    except ValueError as error:
        raise DataError(f"{where}: bndbox: {error}", "malformed box") from error
    if x2 <= x1 or y2 <= y1:
        said = f"xmin={x1:g} ymin={y1:g} xmax={x2:g} ymax={y2:g}"
        raise DataError(f"{where}: degenerate box {said}; xmin < xmax and ymin < ymax are accepted", "degenerate box")
    return RawObject(where, number, labels[name], (x1 - 1, y1 - 1, x2, y2), difficult == "1")


def _text(element: ElementTree.Element, key: str) -> str:
    return (element.findtext(key) or "").strip()
