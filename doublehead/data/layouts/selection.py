"""Keeps the objects of chosen classes (`data.classes`), in their order; the others are left out and counted."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence

from ...errors import DataError
from ..coco import ids_of
from ..files import RawImage, RawObject
from ..names import clean_name, listed, not_a_class, shown_name, similar_name
from .layout import Contents

OTHER_CLASS = "object of another class (data.classes)"


def check_classes(chosen: Sequence[str], known: Sequence[str]) -> None:
    """Refuse chosen classes that the data do not have.

    Raises:
        DataError: names the first one, and a similar class; none is chosen, or one is chosen twice.
    """
    if not chosen or len(set(chosen)) < len(chosen):
        raise DataError(f"data.classes: {' '.join(chosen) or 'nothing'}; different names are accepted", "bad classes")
    for name in chosen:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            near = similar_name(name, known) or (close[0] if close else None)
            hint = f": did you mean '{shown_name(near)}'?" if near else ""
            raise DataError(f"data.classes: the data have no class '{shown_name(name)}'{hint}; theirs are "
                            f"{listed(known)}", "unknown category")  # fmt: skip


def select_classes(contents: Contents, chosen: Sequence[str], names: Sequence[str]) -> Contents:
    """The same images with the objects of the chosen classes alone.

    Args:
        contents: read with the data's own classes.
        chosen: the classes whose objects stay.
        names: the classes that labels refer to, in this order: `chosen`, or a detector's.
    """
    own, own_ids, images = contents
    ids = ids_of(names, dict(zip(own_ids, own, strict=True)))
    labels = {clean_name(name): label for label, name in enumerate(names, 1)}
    kept = set(map(clean_name, chosen))
    return list(names), ids, _selected(images, own, kept, labels)


def _selected(
    images: Iterable[RawImage | DataError], own: Sequence[str], kept: set[str], labels: dict[str, int]
) -> Iterator[RawImage | DataError]:
    for image in images:
        if isinstance(image, RawImage):
            objects, image.objects = image.objects, []
            for item in objects:
                _sort_in(image, item, own[item.label - 1], kept, labels)
        yield image


def _sort_in(image: RawImage, item: RawObject, name: str, kept: set[str], labels: dict[str, int]) -> None:
    if name not in kept:
        image.left_out[OTHER_CLASS] += 1
    elif name not in labels:
        image.errors.append(DataError(f"{item.where}: {not_a_class(name, list(labels))}", "unknown category"))
    else:
        item.label = labels[name]
        image.objects.append(item)
