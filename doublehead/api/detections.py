"""What a predictor finds in an image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor


class Detection(NamedTuple):
    """One object that was found."""

    name: str
    """Its class."""
    score: float
    """From 0 to 1."""
    box: tuple[float, float, float, float]
    """x1, y1, x2, y2 in pixels of the image as it was given; (0, 0, W, H) is the whole image."""
    label: int
    """`classes[label - 1]` is `name`; 0, the background, does not occur."""


@dataclass(frozen=True, eq=False, repr=False)
class Detections:
    """The objects found in one image, best score first; on the CPU.

    `len(detections)` is their number, `for d in detections` gives each as a `Detection`, and
    `detections[detections.scores > 0.8]` selects by a mask, indices or a slice.  As with torchvision's, `["boxes"]`,
    `["labels"]` and `["scores"]` are the tensors.
    """

    boxes: Tensor
    """`Tensor[N, 4]` float32: x1, y1, x2, y2 in pixels of the image as it was given, of a file: turned upright."""
    labels: Tensor
    """`Tensor[N]` int64, from 1 on: label i is `classes[i - 1]`."""
    scores: Tensor
    """`Tensor[N]` float32, from 0 to 1."""
    classes: Sequence[str]
    """The names of all classes that the detector knows."""
    size: tuple[int, int]
    """(height, width) of the image in pixels."""

    @property
    def names(self) -> list[str]:
        """The class name of each."""
        return [self.classes[label - 1] for label in self.labels.tolist()]

    def to_list(self) -> list[dict[str, Any]]:
        """As in `detections.json` of `doublehead detect`: plain dicts with class, label, score, box."""
        return [{"class": name, "label": label, "score": score, "box": list(box)} for name, score, box, label in self]

    def __len__(self) -> int:
        return len(self.boxes)

    def __iter__(self) -> Iterator[Detection]:
        columns = zip(self.names, self.scores.tolist(), self.boxes.tolist(), self.labels.tolist(), strict=True)
        return (Detection(name, score, tuple(box), label) for name, score, box, label in columns)

    def __getitem__(self, chosen: Tensor | slice | Sequence[int] | str) -> Detections | Tensor:
        if isinstance(chosen, str):
            return {"boxes": self.boxes, "labels": self.labels, "scores": self.scores}[chosen]
        if isinstance(chosen, int):
            raise TypeError(f"list(detections)[{chosen}] is one of them; a mask, indices or a slice selects some")
        return Detections(self.boxes[chosen], self.labels[chosen], self.scores[chosen], self.classes, self.size)

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {score:.2f}" for name, score, *_ in list(self)[:8])
        more = f", and {len(self) - 8} more" if len(self) > 8 else ""
        return f"Detections({len(self)} in {self.size[1]}x{self.size[0]}{': ' if shown else ''}{shown}{more})"
