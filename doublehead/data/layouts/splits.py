"""Which split of a layout is trained on and which validates, and the division of a single one.

`data.train_split` and `data.val_split` name them as the data spell them.  Their defaults also find the usual spellings
(`training`, `train2017`, `coco_train`; `valid`, `validation`), `test` validates where nothing else does, and data
without a validation set are divided.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from ...config import DataConfig
from ...errors import DataError
from ..files import RawImage
from ..names import listed
from .folders import SPLIT_WORDS, split_word
from .layout import Layout

Role = Literal["train", "val"]
WHOLE = "all"
"""As the name of a split: a single split undivided."""
COPY = re.compile(r"\.rf\.[0-9A-Za-z]{8,}")
"""What Roboflow adds to the names of the copies of one picture, which must not be divided."""


@dataclass(frozen=True)
class Choice:
    """The split for a role; `divided`: it takes only its share of the images."""

    split: str
    divided: bool = False
    note: str = ""


def choose(layout: Layout, config: DataConfig, role: Role) -> Choice:
    """The split of a layout to train or to validate on.

    Raises:
        DataError: there is no such split, or several could be meant.
    """
    train, val = _find(layout, config, "train"), _find(layout, config, "val")
    if role == "train" and train is None:
        raise DataError(f"{layout.title}: no split to train on; there is {listed(layout.splits)}: name one with "
                        "--data.train-split", "missing split")  # fmt: skip
    wanted = config.train_split if role == "train" else config.val_split
    if role == "train":
        divided = val is None and wanted != WHOLE
        return Choice(train, divided)
    if val is not None:
        note = f"{val} serves as validation" if wanted == "val" and split_word(val) == "test" else ""
        return Choice(val, note=note)
    if train is None:
        raise DataError(f"{layout.title}: no split to validate on; there is {listed(layout.splits)}: name one with "
                        "--data.val-split", "missing split")  # fmt: skip
    return Choice(train, divided=True)


def _find(layout: Layout, config: DataConfig, role: Role) -> str | None:
    """The split for a role; None: the data have none, or have one to divide."""
    wanted = config.train_split if role == "train" else config.val_split
    names = [name for name in layout.splits if name not in layout.unlabelled]
    if wanted in layout.splits:
        return wanted
    if wanted == WHOLE and len(names) == 1:
        return names[0]
    if wanted != role:
        raise DataError(f"{layout.title}: no split {wanted!r} (--data.{role}-split); there is {listed(layout.splits)}",
                        "missing split")  # fmt: skip
    found = _spelt(names, role, layout)
    if found is None and role == "val":
        return _spelt(names, "test", layout)
    if found is None and len(names) == 1 and split_word(names[0]) is None:
        return names[0]
    return found


def _spelt(names: Sequence[str], word: str, layout: Layout) -> str | None:
    for spelling in SPLIT_WORDS[word]:
        exact = [name for name in names if name.lower() == spelling]
        if len(exact) == 1:
            return exact[0]
    meant = [name for name in names if split_word(name) == word]
    if len(meant) > 1:
        option = f"--data.{'train' if word == 'train' else 'val'}-split"
        raise DataError(f"{layout.title}: several splits could be '{word}': {listed(meant)}; name one with {option}",
                        "ambiguous split")  # fmt: skip
    return meant[0] if meant else None


def take_share(
    images: Iterable[RawImage | DataError], role: Role, share: float, seed: int
) -> list[RawImage | DataError]:
    """The images of a single split for a role: about `share` of them validate, at least one on either side.

    The draw depends on the names of the images and the seed alone.  Bad records belong to the training images.
    """
    images = list(images)
    names = sorted({_picture(image) for image in images if isinstance(image, RawImage)}, key=partial(_drawn, seed))
    if len(names) == 1:
        raise DataError("a single picture cannot be divided into training and validation: give a second one, or "
                        f"--data.train-split {WHOLE} --data.val-split {WHOLE}", "empty set")  # fmt: skip
    held_out = set(names[: min(max(round(share * len(names)), 1), len(names) - 1)])
    if role == "val":
        return [image for image in images if isinstance(image, RawImage) and _picture(image) in held_out]
    return [image for image in images if isinstance(image, DataError) or _picture(image) not in held_out]


def _drawn(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogateescape")).digest()


def _picture(image: RawImage) -> str:
    """The image's name, alike on every system and for all copies of one picture."""
    return COPY.sub("", unicodedata.normalize("NFC", image.file_name.replace("\\", "/")))
