"""Data sets and loaders: COCO JSON, Pascal VOC folders, and shapes drawn on the fly.

Boxes are x1, y1, x2, y2 in pixels, measured between pixel edges: (0, 0, W, H) is a whole image.  Label i is class i - 1
of `dataset.classes`; 0 is the background.  Bad records raise a `DataError`; or they are left out, counted in
`dataset.skipped` and summarised in one `DataWarning`, up to a share of the set, beyond which they are an error again.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from doublehead.config import DataConfig, check

from ..errors import DataError
from .coco import read_coco
from .dataset import DataWarning, DetectionDataset, Target
from .files import FileDataset
from .images import read_image
from .jpeg import is_strict
from .loader import Loader, build_loader
from .problems import Problems
from .shapes import ShapesDataset
from .transforms import horizontal_flip
from .voc import read_voc

__all__ = [
    "DataError", "DataWarning", "DetectionDataset", "Loader", "Target",
    "build_dataset", "build_loader", "horizontal_flip", "read_image",
]  # fmt: skip

SHAPES_IMAGES = {"train": 4000, "val": 200}
READERS = {"coco": read_coco, "voc": read_voc}


def build_dataset(
    config: DataConfig,
    split: Literal["train", "val"],
    horizontal_flip: float = 0.0,
    classes: Sequence[str] | None = None,
) -> DetectionDataset:
    """Open the training or the validation set that `config` describes.

    Args:
        split: the set to open.  `train` leaves out images without boxes (but see `config.background`), `val` keeps
            every image.  Targets hold no crowd or difficult boxes and no boxes without area; `coco_ground_truth` does.
        horizontal_flip: probability that the training loader mirrors an image.
        classes: names to use, in this order, instead of the data's own: a detector's, to evaluate it on another data
            set.  An object of another class is then a bad record.

    Raises:
        DataError: files are missing or invalid, or no image is left; a bad record, unless `config.on_bad_record` is
            `skip`; with `skip`, nothing is left, or more than `config.max_skipped` was left out.
        ValueError: an argument or a field of `config` is not accepted.
    """
    if split not in SHAPES_IMAGES:
        raise ValueError(f"split is {split!r}, 'train' or 'val' is accepted")
    check(config, "data")
    train = split == "train"
    name, limit = (config.train_split, config.train_images) if train else (config.val_split, config.val_images)
    if config.format == "shapes":
        return _shapes(name, limit or SHAPES_IMAGES[split], config.image_size, horizontal_flip, classes)
    if config.root is None:
        raise DataError(f"data.root is missing: the folder of the {config.format} data set (--data.root)")
    root = Path(config.root).expanduser()
    if not root.is_dir():
        raise DataError(f"{root}: no such folder (data.root)", "missing folder")
    title = f"{config.format} {root.name} ({name})"
    if not is_strict():
        text = "simplejpeg is not installed: decoding is tolerant, and damage inside a JPEG is not detected"
        warnings.warn(text, DataWarning, stacklevel=2)
    problems = Problems(title, config.on_bad_record == "skip", config.max_skipped)
    found, ids, images = READERS[config.format](root, name, classes, config.outside_root)
    return FileDataset(
        title, found, ids, images, train=train, limit=limit, problems=problems, horizontal_flip=horizontal_flip,
        background=config.background == "keep", max_pixels=config.max_pixels,
    )  # fmt: skip


def _shapes(name: str, length: int, side: int, horizontal_flip: float, classes: Sequence[str] | None) -> ShapesDataset:
    dataset = ShapesDataset(name, length, side, horizontal_flip)
    if classes is not None and list(classes) != dataset.classes:
        raise DataError(f"shapes: its classes are {', '.join(dataset.classes)}, not {', '.join(classes)}")
    return dataset
