"""Finds Pascal VOC's XML: with lists of images or without, in VOC's folders, in others, and beside the images.

In this order: lists in `ImageSets/Main`, in `ImageSets` or at the root; `JPEGImages` or `images` with `Annotations` or
`annotations`; XML beside the images (labelImg); each of these within the folders of splits (Roboflow: `train/`,
`valid/`).  Without a list the XML files are the set: an image without one is left out, and said.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from ..voc import listed_names, read_xml
from .folders import IMAGE_FOLDERS, child, files_in, images_by_stem, is_file, split_folders, split_word
from .layout import Contents, Layout

ANNOTATION_FOLDERS = ("Annotations", "xml", "xmls", "labels")
Pair = tuple[Path, Path]
"""The folders of images and of their XML files."""


def find_voc(root: Path) -> Layout | None:
    """The layout of VOC's XML in a folder; None: there is none."""
    pair = _pair(root)
    if pair is not None:
        lists = _lists(root)
        if lists:
            return _listed(pair, lists)
        title = "VOC without lists" if pair[0].name == "JPEGImages" else "VOC XML"
        return _unlisted({"all": pair}, "VOC XML beside the images" if pair[0] == pair[1] else title)
    nested = _nested(root)
    if nested:
        return _unlisted(nested, "VOC XML in split folders")
    found = {name: pair for name, folder in split_folders(root).items() if (pair := _pair(folder))}
    beside = all(images == annotations for images, annotations in found.values())
    return _unlisted(found, "VOC XML beside the images" if beside else "VOC XML") if found else None


def _pair(folder: Path) -> Pair | None:
    images, annotations = child(folder, IMAGE_FOLDERS), child(folder, ANNOTATION_FOLDERS)
    if images and annotations and _has_xml(annotations):
        return images, annotations
    if images and _has_xml(images) and images_by_stem(images):
        return images, images
    return (folder, folder) if _has_xml(folder) and images_by_stem(folder) else None


def _nested(root: Path) -> dict[str, Pair]:
    """`images/train` with `annotations/train`."""
    images, annotations = child(root, IMAGE_FOLDERS), child(root, ANNOTATION_FOLDERS)
    if not images or not annotations:
        return {}
    of_images = split_folders(images)
    return {name: (of_images[name], folder) for name, folder in split_folders(annotations).items() if
            name in of_images and _has_xml(folder)}  # fmt: skip


def _has_xml(folder: Path) -> bool:
    """Whether there are annotations of single images; CVAT's own format is one file for all of them."""
    names = files_in(folder, (".xml",))
    return any(_is_voc(folder / name) for name in names[:5])


def _is_voc(path: Path) -> bool:
    if not is_file(path):
        return False
    try:
        start = path.read_bytes()[:2000].replace(b"\0", b"")
    except OSError:
        return False
    return b"<annotation>" in start or b"<annotation " in start or not start.strip()


def _lists(root: Path) -> dict[str, Path]:
    """Split -> list, without VOC's lists of single classes (`cat_train.txt`)."""
    for folder in (root / "ImageSets" / "Main", root / "ImageSets", root):
        names = [Path(name).stem for name in files_in(folder, (".txt",)) if is_file(folder / name)]
        if folder == root:
            names = [name for name in names if split_word(name)]
        plain = [name for name in names if "_" not in name] or names
        if plain:
            return {name: folder / f"{name}.txt" for name in plain}
    return {}


def _listed(pair: Pair, lists: dict[str, Path]) -> Layout:
    layout = Layout("voc", "VOC", {})
    for name, path in lists.items():
        layout.splits[name] = partial(_read_list, pair, path)
    return layout


def _read_list(pair: Pair, listing: Path, classes: Sequence[str] | None, outside_root: bool) -> Contents:
    names = [(number, _stem(name, pair[0]), where) for number, name, where in listed_names(listing)]
    return read_xml(names, *pair, [pair[1]], classes, outside_root)


def _stem(line: str, images: Path) -> str:
    """An image's name from a line, which may also be its path, and even the annotation's after it."""
    first = line.replace("\\", "/")
    if ".xml" in first and len(first.split()) == 2:
        first = first.split()[0]
    for prefix in ("./", f"{images.name}/"):
        first = first.removeprefix(prefix)
    stem, dot, suffix = first.rpartition(".")
    return stem if dot and suffix.lower() in ("jpg", "jpeg", "png", "bmp", "webp", "tif", "tiff") else first


def _unlisted(pairs: dict[str, Pair], title: str) -> Layout:
    layout = Layout("voc", title, {})
    everything = [annotations for _, annotations in pairs.values()]
    for name, pair in pairs.items():
        layout.splits[name] = partial(_read_folder, layout, pair, everything)
    return layout


def _read_folder(
    layout: Layout, pair: Pair, everything: Iterable[Path], classes: Sequence[str] | None, outside_root: bool
) -> Contents:
    images, annotations = pair
    stems = [Path(name).stem for name in files_in(annotations, (".xml",))]
    bare = images_by_stem(images).keys() - set(stems)
    if bare:
        layout.note(f"{len(bare)} x image without an XML file in {images.name}, such as {min(bare)}: left out")
    listed = [(number, stem, str(annotations / f"{stem}.xml")) for number, stem in enumerate(stems, 1)]
    return read_xml(listed, images, annotations, list(everything), classes, outside_root)
