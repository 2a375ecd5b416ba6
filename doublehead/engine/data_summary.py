"""What a data set holds, in numbers: images, boxes by class and size, bad records."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from doublehead.config import DataConfig
from doublehead.data import DataError, DataWarning, DetectionDataset, build_dataset, open_splits
from doublehead.data.layouts.selection import OTHER_CLASS
from doublehead.engine.repeated import Repeated

Split = Literal["train", "val"]
SMALL, LARGE = 32.0**2, 96.0**2
"""Areas in square pixels below which COCO calls an object small, and from which large."""
THIN = 0.01
"""A box with a side below this many pixels has no area."""
FEW = 20
"""A class with fewer boxes to learn from is noted."""


@dataclass(frozen=True)
class ClassCount:
    """Boxes of one class, crowd and difficult ones and those without area not counted."""

    boxes: int
    small: int
    medium: int
    large: int
    images: int
    """Images that show the class."""


@dataclass(frozen=True)
class SplitSummary:
    """What one split holds; bad records are not among the images and boxes."""

    images: int
    without_boxes: int
    """Images without a box to learn from; they are among `images`."""
    classes: dict[str, ClassCount]
    other_classes: int
    """Objects of classes that were not chosen."""
    crowd: int
    """Crowd and difficult boxes."""
    without_area: int
    clipped: int
    """Boxes that crossed the image's border."""
    bad: dict[str, int]
    """Bad records by reason."""
    notes: list[str]
    """What the reader of the data said: the first of each kind of bad record, and of boxes that it changed."""
    widths: tuple[int, float, int]
    """Smallest, median, largest, in pixels."""
    heights: tuple[int, float, int]

    @property
    def boxes(self) -> int:
        """Boxes of all classes."""
        return sum(count.boxes for count in self.classes.values())


@dataclass
class Opened:
    """Both splits of a data set, as far as they can be read."""

    said: str = ""
    """The layout in one line; empty if a split cannot be read."""
    splits: dict[Split, DetectionDataset] = field(default_factory=dict)
    failed: dict[Split, DataError] = field(default_factory=dict)
    """Why a split cannot be read."""
    notes: dict[Split, list[str]] = field(default_factory=dict)
    """What the reader said of a split: bad records with the first of each kind, boxes that it changed."""


def open_counted(config: DataConfig) -> Opened:
    """Open both splits as a training would, with bad records left out and counted, however many there are.

    Raises:
        DataError: neither can be read; the error is that of the training split.
    """
    config = replace(config, on_bad_record="skip", max_skipped=1.0)
    opened = Opened()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DataWarning)
        try:
            both = open_splits(config)
        except DataError:
            caught.clear()
            _open_each(config, opened)
        else:
            opened.said, opened.splits = both.said, {"train": both.train, "val": both.val}
    opened.notes = _notes(opened.splits, [str(warning.message) for warning in caught])
    return opened


def _open_each(config: DataConfig, opened: Opened) -> None:
    for split in ("train", "val"):
        classes = opened.splits["train"].classes if opened.splits else None
        try:
            opened.splits[split] = build_dataset(config, split, classes=classes)
        except DataError as error:
            opened.failed[split] = error
    if not opened.splits:
        raise opened.failed["train"]


def _notes(splits: Mapping[Split, DetectionDataset], messages: Sequence[str]) -> dict[Split, list[str]]:
    """The lines of each split's warning, whose heading is the split's name."""
    notes: dict[Split, list[str]] = {}
    for split, dataset in splits.items():
        found = next((text for text in messages if text.startswith(f"{dataset.name}:\n")), "")
        messages = [text for text in messages if text is not found]
        notes[split] = [line.strip() for line in found.splitlines()[1:]]
    return notes


def summarize(dataset: DetectionDataset, notes: Sequence[str] = ()) -> SplitSummary:
    """Count what an opened split holds.

    Args:
        notes: what the reader said while it opened the split.
    """
    entries = [entry for entry in dataset.annotations() if not entry["iscrowd"] and min(entry["bbox"][2:]) >= THIN]
    labels = {category: label for label, category in enumerate(dataset.category_ids)}
    owners = np.array([labels[entry["category_id"]] for entry in entries], np.int64)
    areas = np.array([entry["area"] for entry in entries], np.float64)
    images = np.array([entry["image_id"] for entry in entries], object)
    counts = {name: _count(areas[owners == i], images[owners == i]) for i, name in enumerate(dataset.classes)}
    shown = len(set(images.tolist()))
    dropped = dataset.unused["image without boxes"]
    heights, widths = np.array(dataset.image_sizes).T
    return SplitSummary(
        images=len(dataset) + dropped,
        without_boxes=len(dataset) - shown + dropped,
        classes=counts,
        other_classes=dataset.unused[OTHER_CLASS],
        crowd=dataset.unused["crowd or difficult box"],
        without_area=dataset.unused["box without area"],
        clipped=dataset.clipped,
        bad=dict(dataset.skipped),
        notes=list(notes),
        widths=_spread(widths),
        heights=_spread(heights),
    )


def _count(areas: np.ndarray, images: np.ndarray) -> ClassCount:
    small, large = int((areas < SMALL).sum()), int((areas >= LARGE).sum())
    return ClassCount(len(areas), small, len(areas) - small - large, large, len(set(images.tolist())))


def _spread(values: np.ndarray) -> tuple[int, float, int]:
    return int(values.min()), float(np.median(values)), int(values.max())


def as_json(said: str, splits: Mapping[Split, SplitSummary], repeated: Repeated) -> dict[str, Any]:
    """The layout's line and the counts as plain values."""
    return {
        "said": said,
        "splits": {name: asdict(summary) for name, summary in splits.items()},
        "repeated": asdict(repeated),
    }


def as_text(splits: Mapping[Split, SplitSummary]) -> str:
    """Two tables, with a line for each class and for each number of images; at most 100 columns for two splits."""
    names = list(next(iter(splits.values())).classes)
    width = min(23, max(len("boxes cut at the border"), *(len(name) for name in names)))
    lines = [f"{'':{width}}" + "".join(f"  {f' {name} ':-^36}" for name in splits)]
    lines.append(
        f"{'class':{width}}" + f"  {'boxes':>8}{'small':>7}{'medium':>7}{'large':>7}{'images':>7}" * len(splits)
    )
    rows = [(name, [summary.classes[name] for summary in splits.values()]) for name in names]
    for name, counts in [*rows, ("all", [_total(summary) for summary in splits.values()])]:
        cells = (f"  {_n(c.boxes, 8)}{_n(c.small)}{_n(c.medium)}{_n(c.large)}{_n(c.images)}" for c in counts)
        lines.append(f"{_short(name, width):{width}}" + "".join(cells))
    lines.append("")
    for title, value in _ROWS.items():
        lines.append(f"{title:{width}}" + "".join(f"  {value(summary):>36}" for summary in splits.values()))
    return "\n".join(lines)


def _n(number: int, width: int = 7) -> str:
    return f"{number:>{width},}" if number else f"{'-':>{width}}"


def _total(summary: SplitSummary) -> ClassCount:
    counts = summary.classes.values()
    sums = (sum(getattr(count, name) for count in counts) for name in ("boxes", "small", "medium", "large"))
    return ClassCount(*sums, images=summary.images - summary.without_boxes)


def _short(name: str, width: int) -> str:
    return name if len(name) <= width else name[: width - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _range(values: tuple[int, float, int]) -> str:
    least, median, most = values
    return f"{least} / {median:g} / {most}"


_ROWS = {
    "images": lambda summary: f"{summary.images:,}",
    "images without boxes": lambda summary: f"{summary.without_boxes:,}",
    "width: min/median/max": lambda summary: _range(summary.widths),
    "height": lambda summary: _range(summary.heights),
    "of other classes": lambda summary: f"{summary.other_classes:,}",
    "crowd or difficult": lambda summary: f"{summary.crowd:,}",
    "boxes without area": lambda summary: f"{summary.without_area:,}",
    "boxes cut at the border": lambda summary: f"{summary.clipped:,}",
    "bad records": lambda summary: f"{sum(summary.bad.values()):,}",
}


def remarks(splits: Mapping[Split, SplitSummary], repeated: Repeated) -> list[str]:
    """What a user should know before training, a line each."""
    found = [f"{split}: {note}" for split, summary in splits.items() for note in summary.notes]
    if train := splits.get("train"):
        none = [name for name, count in train.classes.items() if not count.boxes]
        if none:
            found.append(f"no box to learn from: {_some(none)}")
        few = [f"{name} {count.boxes}" for name, count in train.classes.items() if 0 < count.boxes < FEW]
        if few:
            found.append(f"few boxes to learn from (fewer than {FEW}): {_some(few)}")
    if val := splits.get("val"):
        none = [name for name, count in val.classes.items() if not count.boxes]
        if none:
            found.append(f"no box in val, so no AP: {_some(none)}")
    if repeated.across:
        train_file, val_file = repeated.across[0]
        found.append(
            f"{len(repeated.across)} pictures are in train and in val, so that AP is too high; the first is "
            f"{train_file} = {val_file}"
        )
    if repeated.named:
        train_file, val_file = repeated.named[0]
        found.append(
            f"{len(repeated.named)} names are in train and in val, with other content: copies of one picture make AP "
            f"too high; the first is {train_file}, {val_file}"
        )
    for split in splits:
        twice = [pair for pair in repeated.within if pair[0] == split]
        if twice:
            found.append(
                f"{split}: {len(twice)} pictures occur more than once; the first is {' = '.join(twice[0][1:])}"
            )
    return found


def _some(names: Sequence[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
