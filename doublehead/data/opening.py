"""Opens the data sets that a configuration describes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from doublehead.config import DataConfig, check

from ..errors import DataError
from .coco import is_coco, read_coco
from .dataset import DataWarning, DetectionDataset
from .files import FileDataset
from .jpeg import is_strict
from .layouts.finding import find_layout
from .layouts.layout import FAMILIES, Contents, Layout
from .layouts.selection import OTHER_CLASS, check_classes, select_classes
from .layouts.splits import choose, take_share
from .layouts.unknown import no_folder
from .names import similar_name
from .problems import Problems
from .shapes import ShapesDataset
from .voc import is_voc, read_voc

SHAPES_IMAGES = {"train": 4000, "val": 200}
TITLES = {"shapes": "generated shapes", "coco": "COCO", "voc": "VOC"}
"""Names of the sets whose layout is not looked for."""
Role = Literal["train", "val"]


@dataclass
class Splits:
    """Both sets of a training, and one line about them."""

    train: DetectionDataset
    val: DetectionDataset
    said: str
    """Such as "COCO, Roboflow export: 160 train, 40 valid, 6 classes; category 0, 'cells', has no boxes: dropped"."""


def open_splits(config: DataConfig, horizontal_flip: float = 0.0, classes: Sequence[str] | None = None) -> Splits:
    """Open the training and the validation set that `config` describes, as `build_dataset` does.

    Args:
        horizontal_flip, classes: see `build_dataset`; the validation set has the training set's classes.

    Raises:
        DataError, ValueError: see `build_dataset`.
    """
    check(config, "data")
    layout = _layout(config)
    train = _open(config, "train", layout, horizontal_flip, classes)
    val = _open(config, "val", layout, 0.0, train.classes)
    names = {"train": config.train_split, "val": config.val_split}
    title, notes = TITLES.get(config.format, config.format), []
    if layout is not None:
        chosen = {role: choose(layout, config, role) for role in ("train", "val")}
        names = {role: role if choice.divided else choice.split for role, choice in chosen.items()}
        title, notes = layout.title, [*(c.note for c in chosen.values() if c.note), *layout.notes]
        if chosen["val"].divided:
            notes.insert(0, f"one split: {config.val_share:.0%} held out by seed {config.split_seed}")
    notes += _trained_on(train, val)
    alike = [(similar_name(name, train.classes[:i]), name) for i, name in enumerate(train.classes)]
    notes += [f"classes '{one}' and '{name}' differ in case or spaces alone" for one, name in alike if one is not None]
    counts = f"{len(train)} {names['train']}, {len(val)} {names['val']}, {len(train.classes)} classes"
    return Splits(train, val, "; ".join([f"{title}: {counts}", *notes]))


def _trained_on(train: DetectionDataset, val: DetectionDataset) -> list[str]:
    """A note if images of the validation set are in the training set, by their files."""
    if not (isinstance(train, FileDataset) and isinstance(val, FileDataset)):
        return []
    both = len(set(train.paths) & set(val.paths))
    if not both:
        return []
    count = "the" if both == len(val) else f"{both} of {len(val)}"
    return [f"{count} validation images are trained on too"]


def build_dataset(
    config: DataConfig,
    split: Role,
    horizontal_flip: float = 0.0,
    classes: Sequence[str] | None = None,
) -> DetectionDataset:
    """Open the training or the validation set that `config` describes.

    Args:
        split: the set to open.  `train` leaves out images without boxes (but see `config.background`), `val` keeps
            every image.  Targets hold no crowd or difficult boxes and no boxes without area; `coco_ground_truth` does.
        horizontal_flip: probability that the training loader mirrors an image.
        classes: names to use, in this order, instead of the data's own: a detector's, to evaluate it on another data
            set.  An object of another class is then a bad record, unless `config.classes` leaves it out.

    Raises:
        DataError: the layout is not known, files are missing or invalid, or no image is left; a bad record, unless
            `config.on_bad_record` is `skip`; with `skip`, nothing is left, or more than `config.max_skipped` was left
            out; `config.classes` names a class that the training data do not have, or leaves no object.
        ValueError: an argument or a field of `config` is not accepted.
    """
    if split not in SHAPES_IMAGES:
        raise ValueError(f"split is {split!r}, 'train' or 'val' is accepted")
    check(config, "data")
    return _open(config, split, _layout(config), horizontal_flip, classes)


def _layout(config: DataConfig) -> Layout | None:
    """The layout found in the root; None for generated shapes, and COCO's and VOC's own layouts asked for by name."""
    if config.format == "shapes":
        return None
    if config.root is None:
        raise DataError(f"data.root is missing: the folder of the {config.format} data set (--data.root)")
    root = Path(config.root).expanduser()
    if not root.is_dir():
        raise no_folder(root)
    own = {"coco": is_coco, "voc": is_voc}.get(config.format)
    if own is not None and any(own(root, split) for split in (config.train_split, config.val_split)):
        return None
    return find_layout(root, FAMILIES if config.format == "auto" else (config.format,))


def _open(
    config: DataConfig, split: Role, layout: Layout | None, horizontal_flip: float, classes: Sequence[str] | None
) -> DetectionDataset:
    train = split == "train"
    name, limit = (config.train_split, config.train_images) if train else (config.val_split, config.val_images)
    if config.format == "shapes":
        return _shapes(name, limit or SHAPES_IMAGES[split], config, horizontal_flip, classes)
    root = Path(config.root).expanduser()
    family = layout.family if layout else config.format
    if layout is not None:
        choice = choose(layout, config, split)
        name = f"{split}, divided by seed {config.split_seed}" if choice.divided else choice.split
    title = f"{family} {root.name or root.absolute().name} ({name})"
    if not is_strict():
        text = "simplejpeg is not installed: decoding is tolerant, and damage inside a JPEG is not detected"
        warnings.warn(text, DataWarning, stacklevel=3)
    problems = Problems(title, config.on_bad_record == "skip", config.max_skipped)
    found, ids, images = _contents(config, split, layout, classes)
    dataset = FileDataset(
        title, found, ids, images, train=train, limit=limit, problems=problems, horizontal_flip=horizontal_flip,
        background=config.background == "keep", max_pixels=config.max_pixels,
    )  # fmt: skip
    dataset.is_voc = family == "voc"
    if dataset.unused[OTHER_CLASS] and not dataset.has_objects:
        raise DataError(f"{title}: no object of the chosen classes is left, {dataset.left_out()}; classes: "
                        f"{', '.join(config.classes)}", "empty set")  # fmt: skip
    return dataset


def _contents(config: DataConfig, split: Role, layout: Layout | None, classes: Sequence[str] | None) -> Contents:
    """What the split's reader gives, divided and selected as `config` says."""
    root = Path(config.root).expanduser()
    own = None if config.classes is not None else classes
    if layout is None:
        read = {"coco": read_coco, "voc": read_voc}[config.format]
        contents = read(root, config.train_split if split == "train" else config.val_split, own, config.outside_root)
    else:
        choice = choose(layout, config, split)
        contents = layout.splits[choice.split](own, config.outside_root)
        if choice.divided:
            names, ids, images = contents
            contents = names, ids, iter(take_share(images, split, config.val_share, config.split_seed))
    if config.classes is None:
        return contents
    if split == "train" and classes is None:
        check_classes(config.classes, contents[0])
    return select_classes(contents, config.classes, classes or config.classes)


def _shapes(
    name: str, length: int, config: DataConfig, horizontal_flip: float, classes: Sequence[str] | None
) -> ShapesDataset:
    dataset = ShapesDataset(name, length, config.image_size, horizontal_flip)
    if config.classes is not None and list(config.classes) != dataset.classes:
        raise DataError(
            f"data.classes: generated shapes have {', '.join(dataset.classes)}, in this order, and no choice"
        )
    if classes is not None and list(classes) != dataset.classes:
        raise DataError(f"shapes: its classes are {', '.join(dataset.classes)}, not {', '.join(classes)}")
    return dataset
