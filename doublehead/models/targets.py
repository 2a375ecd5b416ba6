"""Checks of the ground truth that a user passes to the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def check_targets(images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]] | None, num_classes: int) -> None:
    """Refuse targets that cannot be trained on, naming the target and the box.

    Boxes may reach over the image's border, or lie outside of it, as in torchvision.  Labels and boxes that are on a
    GPU already are not read, as that would make the host wait: keep targets on the CPU, the model moves them.

    Raises:
        TypeError: not a list of dicts of tensors.
        ValueError: targets missing, or shapes, dtypes, labels or boxes that are not accepted.
    """
    if isinstance(targets, Mapping):
        raise TypeError("targets: expected a list of a dict for each image, got one dict: put it into a list")
    if targets is not None and not isinstance(targets, Sequence):
        raise TypeError(f"targets: expected a list of a dict for each image, got {type(targets).__name__}")
    if targets is None or len(targets) != len(images):
        got = "none" if targets is None else len(targets)
        raise ValueError(f"targets: training needs one per image ({len(images)}), got {got}")
    for row, target in enumerate(targets):
        _check_form(f"targets[{row}]", target)
        if target["labels"].device.type == "cpu":
            _check_labels(row, target["labels"], num_classes)
        if target["boxes"].device.type == "cpu":
            wrong = ~valid_boxes(target["boxes"])
            if wrong.any():
                raise_invalid(row, target["boxes"], wrong)


def _check_form(where: str, target: Mapping[str, Tensor]) -> None:
    if not isinstance(target, Mapping):
        raise TypeError(f"{where}: expected a dict with 'boxes' and 'labels', got {type(target).__name__}")
    if missing := {"boxes", "labels"} - set(target):
        raise ValueError(f"{where}: {' and '.join(sorted(missing))} missing, got {list(target)}")
    boxes, labels = target["boxes"], target["labels"]
    for name, value in (("boxes", boxes), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{where}[{name!r}]: expected a tensor, got {type(value).__name__}; torch.as_tensor converts lists and "
                "arrays"
            )
    if boxes.dim() != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
        raise ValueError(
            f"{where}: expected boxes Tensor[n, 4] and labels Tensor[n], "
            f"got {tuple(boxes.shape)} and {tuple(labels.shape)}"
        )
    if boxes.dtype == torch.bool or boxes.is_complex():
        raise ValueError(f"{where}: expected boxes of floats or integers, got {boxes.dtype}")
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"{where}: expected labels of integers, got {labels.dtype}; labels.long() converts them")


def _check_labels(row: int, labels: Tensor, num_classes: int) -> None:
    labels = labels.long()  # not every integer can be compared
    if not ((labels >= 1) & (labels < num_classes)).all():
        raise ValueError(
            f"targets[{row}]: expected labels in 1 .. {num_classes - 1}, got {labels.min()} .. {labels.max()}"
        )


def valid_boxes(boxes: Tensor) -> Tensor:
    """Which boxes `Tensor[..., 4]` are finite and not empty in float32: bool `Tensor[...]`."""
    extent = boxes[..., 2:].to(torch.float32) - boxes[..., :2].to(torch.float32)
    return ((extent > 0) & (extent < math.inf)).all(-1)


def raise_invalid(row: int, boxes: Tensor, wrong: Tensor) -> None:
    """Raises a ValueError that shows the first box of `Tensor[n, 4]` that is `wrong`, `Tensor[n]` bool."""
    number = int(wrong.nonzero()[0])
    x1, y1, x2, y2 = box = boxes[number].tolist()
    if not all(map(math.isfinite, box)):
        hint = "every number finite"
    elif x2 <= x1 or y2 <= y1:
        hint = "x1 < x2 and y1 < y2; boxes of (x, y, width, height) are to be converted"
    else:
        hint = "x1 < x2 and y1 < y2 by more than float32 can lose"
    numbers = ", ".join(f"{value:g}" for value in box)
    raise ValueError(f"targets[{row}]: boxes[{number}] is [{numbers}]; expected (x1, y1, x2, y2) in pixels with {hint}")
