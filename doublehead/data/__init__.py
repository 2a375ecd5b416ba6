"""Data sets and loaders: COCO JSON, Pascal VOC folders, and shapes drawn on the fly."""

from __future__ import annotations

from doublehead.recipes import DataConfig

from .dataset import DataError, DataWarning, DetectionDataset, Target
from .loader import build_loader
from .shapes import ShapesDataset

__all__ = ["DataError", "DataWarning", "DetectionDataset", "Target", "build_dataset", "build_loader"]

SHAPES_IMAGES = {"train": 4000, "val": 200}


def build_dataset(config: DataConfig, split: str, horizontal_flip: float = 0.0) -> DetectionDataset:
    name, limit = (
        (config.train_split, config.train_images) if split == "train" else (config.val_split, config.val_images)
    )
    if config.format == "shapes":
        return ShapesDataset(name, SHAPES_IMAGES[split] if limit is None else limit, config.image_size, horizontal_flip)
    raise NotImplementedError(config.format)
