"""Class names and category ids for a converted model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..config import DataConfig
from ..data.names import clean_name, wrong_name
from .mapping import ConversionError

COCO = {
    1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train", 8: "truck", 9: "boat",
    10: "traffic light", 11: "fire hydrant", 13: "stop sign", 14: "parking meter", 15: "bench", 16: "bird", 17: "cat",
    18: "dog", 19: "horse", 20: "sheep", 21: "cow", 22: "elephant", 23: "bear", 24: "zebra", 25: "giraffe",
    27: "backpack", 28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase", 34: "frisbee", 35: "skis",
    36: "snowboard", 37: "sports ball", 38: "kite", 39: "baseball bat", 40: "baseball glove", 41: "skateboard",
    42: "surfboard", 43: "tennis racket", 44: "bottle", 46: "wine glass", 47: "cup", 48: "fork", 49: "knife",
    50: "spoon", 51: "bowl", 52: "banana", 53: "apple", 54: "sandwich", 55: "orange", 56: "broccoli", 57: "carrot",
    58: "hot dog", 59: "pizza", 60: "donut", 61: "cake", 62: "chair", 63: "couch", 64: "potted plant", 65: "bed",
    67: "dining table", 70: "toilet", 72: "tv", 73: "laptop", 74: "mouse", 75: "remote", 76: "keyboard",
    77: "cell phone", 78: "microwave", 79: "oven", 80: "toaster", 81: "sink", 82: "refrigerator", 84: "book",
    85: "clock", 86: "vase", 87: "scissors", 88: "teddy bear", 89: "hair drier", 90: "toothbrush",
}  # fmt: skip
"""COCO's 80 categories by id; ten of the ids from 1 to 90 are not used."""
VOC = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
"""Pascal VOC's 20 classes."""


def name_classes(number: int, given: Sequence[str] | None) -> tuple[list[str], list[int]]:
    """Names and category ids of `number` classes (without background): label i is `names[i - 1]`.

    torchvision's COCO models have a row for every id from 1 to 90.  All rows are kept, because softmax runs over all of
    them; the ten that COCO never used are called "unused 12", ...  Data sets are matched by name, so they do not need
    to know these.

    Args:
        given: the names; None: COCO's for 80 and 90 classes, Pascal VOC's for 20, otherwise "class 1", ...

    Raises:
        ConversionError: the wrong number of names, or a name that occurs twice.
    """
    if given is not None:
        names = [clean_name(name) for name in given]
        if len(names) != number:
            raise ConversionError(f"{len(names)} class names for a model of {number} classes (without background)")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConversionError(f"class names that occur more than once: {', '.join(twice)}")
        wrong = next((name for name in names if wrong_name(name)), None)
        if wrong is not None:
            raise ConversionError(f"the class name {wrong!r} {wrong_name(wrong)}")
        ids = {name: i for i, name in COCO.items()}
        return names, [ids[name] for name in names] if set(names) == set(ids) else list(range(1, number + 1))
    if number == len(COCO):
        return list(COCO.values()), list(COCO)
    if number == max(COCO):
        return [COCO.get(i, f"unused {i}") for i in range(1, number + 1)], list(range(1, number + 1))
    if number == len(VOC):
        return list(VOC), list(range(1, number + 1))
    return [f"class {i}" for i in range(1, number + 1)], list(range(1, number + 1))


def data_of(names: Sequence[str]) -> DataConfig:
    """The data set on which a model with these classes is evaluated by default: COCO or Pascal VOC."""
    if set(COCO.values()) <= set(names):
        return DataConfig("coco", "data/coco", "train2017", "val2017")
    if set(names) == set(VOC):
        return DataConfig("voc", "data/VOCdevkit/VOC2007", "trainval", "test")
    return DataConfig("coco")


def read_names(path: str | Path) -> list[str]:
    """Read class names, one per line; blank lines at the end are ignored.

    Raises:
        ConversionError: the file cannot be read, or is not UTF-8 text.
    """
    try:
        text = Path(path).read_text("utf-8-sig")
    except OSError as error:
        raise ConversionError(f"--classes {path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConversionError(f"--classes {path}: not a text in UTF-8") from error
    return [clean_name(line) for line in text.rstrip().split("\n")] if text.strip() else []
