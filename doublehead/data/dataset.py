"""The interface of data sets: images, boxes, names, and the ground truth for pycocotools."""

from __future__ import annotations

from collections import Counter
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


class DataWarning(UserWarning):
    """Records were left out, or boxes clipped; the message counts them and names the first of each kind."""


class Target(TypedDict):
    """The annotation of one image.

    `boxes` is a float32 `Tensor[n, 4]`: x1, y1, x2, y2 in pixels of the image as stored, measured between
    pixel edges, so that a box around the whole image is (0, 0, W, H).  `labels` is an int64 `Tensor[n]`;
    label i is `classes[i - 1]`, 0 is the background and never occurs.
    """

    boxes: Tensor
    labels: Tensor
    image_id: int


class DetectionDataset(Dataset):
    """Images and boxes by index; `build_dataset` creates one.

    Indexing never flips an image; the loader does, because a flip depends on the epoch.

    Attributes:
        name: the data set's name in messages.
        classes: names; label i is `classes[i - 1]`.
        category_ids: ids of the classes in the annotation file; label i is `category_ids[i - 1]`.
        image_ids, file_names, image_sizes: per index; a size is (height, width) in pixels.
        horizontal_flip: probability that the training loader mirrors an image.
        skipped: the number of bad records that were left out, by reason (`on_bad_record="skip"`).
        unused: the number of records that are valid but not targets: crowd and difficult boxes, boxes without area, and
            in training images without boxes (`background="drop"`).
        clipped: the number of boxes that crossed the image's border and were clipped.
        is_voc: the annotations are Pascal VOC's, so that its AP is wanted too.
        replace_unreadable: the training loader replaces an image that cannot be decoded by the next one.
        max_replaced: the number of images that may be replaced in this way before it is an error.
    """

    name: str
    classes: list[str]
    category_ids: list[int]
    image_ids: list[int]
    file_names: list[str]
    image_sizes: list[tuple[int, int]]
    horizontal_flip: float
    skipped: Counter[str]
    unused: Counter[str]
    clipped: int = 0
    is_voc: bool = False
    replace_unreadable: bool = False
    max_replaced: float = float("inf")

    def __len__(self) -> int:
        return len(self.image_ids)

    def left_out(self) -> str:
        """`unused` and `skipped` as text for the log; empty if nothing was left out."""
        counts = [f"{count} x {what}" for what, count in (*self.unused.items(), *self.skipped.items()) if count]
        return ", ".join(counts)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        """Image `Tensor[3, H, W]` uint8 RGB and its target.

        Raises:
            DataError: the image file cannot be decoded.
            IndexError: `index` outside -len .. len - 1.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} in a data set of {len(self)} images")
        return self.load(index % len(self))

    def load(self, index: int) -> tuple[Tensor, Target]:
        """`dataset[index]` for 0 <= index < len."""
        raise NotImplementedError

    def annotations(self) -> list[dict[str, Any]]:
        """Every annotation in COCO's JSON form, with crowd and difficult ones, without segmentations."""
        raise NotImplementedError

    def coco_ground_truth(self) -> dict[str, Any]:
        """The split as a COCO JSON dict: pycocotools' `COCO().dataset`.

        Boxes are x, y, width, height.  COCO files keep their ids, boxes, areas and crowd flags.  Otherwise ids count
        from 1, areas are those of the boxes, and a `difficult` object has `iscrowd` and `ignore` 1, so that it counts
        neither as found nor as missed.  So does an annotation with `ignore` 1 alone, which pycocotools would not
        respect.  Ids also count from 1 if a file has an annotation with id 0, which means "no match" in pycocotools.
        """
        images = zip(self.image_ids, self.file_names, self.image_sizes, strict=True)
        return {
            "info": {"description": self.name},
            "licenses": [],
            "images": [{"id": i, "file_name": name, "height": h, "width": w} for i, name, (h, w) in images],
            "annotations": self.annotations(),
            "categories": [{"id": i, "name": n} for i, n in zip(self.category_ids, self.classes, strict=True)],
        }


def make_target(boxes: np.ndarray, labels: np.ndarray, image_id: int) -> Target:
    """Arrays [n, 4] and [n] as a `Target`; both are copied, so that callers cannot change the data set."""
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "image_id": int(image_id),
    }
