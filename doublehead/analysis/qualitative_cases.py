"""Cases in which two heads differ on an object, and their form in the state of an interrupted search."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from doublehead.config import ReadOutName

READOUTS: dict[str, ReadOutName] = {"conv": "conv", "fc": "fc", "Ext": "fused"}
"""Column of the figure -> read-out."""


class Kind(NamedTuple):
    """A way in which two heads differ on an object."""

    name: str
    head: str
    outcome: str
    """The outcome for the object with `head`, one of `OUTCOMES`."""
    other: str
    other_outcome: str
    title: str


KINDS = (
    Kind("only-fc-finds", "fc", "found", "conv", "missed", "The fc-head finds what the conv-head misses"),
    Kind("only-conv-finds", "conv", "found", "fc", "missed", "The conv-head finds what the fc-head misses"),
    Kind("fc-duplicates", "fc", "duplicate", "conv", "found", "The fc-head finds twice what the conv-head finds once"),
    Kind(
        "conv-duplicates", "conv", "duplicate", "fc", "found", "The conv-head finds twice what the fc-head finds once"
    ),
)


OUTCOMES = ("found", "duplicate", "missed", "unclear")


class Verdict(NamedTuple):
    """The outcome for an object with one read-out."""

    outcome: str
    """`found`: one detection is assigned to it, with a high IoU; `duplicate`: several are; `missed`: no detection of
    its class has a high IoU with it; `unclear`: one has, but is assigned to a neighbour."""
    score: float | None
    """The score of the best detection, below the threshold for a missed object; None: there is no detection at all."""
    duplicate: float | None = None
    """The score of the second detection."""


@dataclass(frozen=True)
class Case:
    """An object on which two heads differ."""

    kind: Kind
    image: int
    """Index of the image in the data set."""
    object: int
    """Index of the object in the image's ground truth."""
    label: int
    box: tuple[float, float, float, float]
    verdicts: dict[str, Verdict]
    at_box: dict[str, float]
    """Head -> score of the class on the object's own box."""

    @property
    def telling(self) -> float:
        """How telling the case is: the difference of the heads' scores, or the duplicate's score."""
        mine, other = self.verdicts[self.kind.head], self.verdicts[self.kind.other]
        return mine.duplicate if mine.duplicate is not None else mine.score - (other.score or 0.0)


class Cases:
    """The cases of some images; a `shards.Summary`."""

    def __init__(self, cases: Iterable[Case] = ()) -> None:
        self.cases = list(cases)

    def empty(self) -> Cases:
        """No cases."""
        return Cases()

    def merge(self, other: Cases) -> None:
        """Add the cases of other images."""
        self.cases += other.cases

    def sorted(self) -> list[Case]:
        """The cases in the data set's order, on any number of processes."""
        return sorted(self.cases, key=lambda case: (case.image, case.object))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"cases": [vars(case) | {"kind": case.kind.name} for case in self.cases]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Cases:
        """Rebuild cases from the result of `to_dict`.

        Raises:
            ValueError, TypeError, KeyError: the values are not such a result.
        """
        return cls(map(_case, values["cases"]))


def _case(value: dict[str, Any]) -> Case:
    kinds = {kind.name: kind for kind in KINDS}
    verdicts = {name: Verdict(*verdict) for name, verdict in value["verdicts"].items()}
    case = Case(**(value | {"kind": kinds[value["kind"]], "box": tuple(value["box"]), "verdicts": verdicts}))
    scores = [score for verdict in verdicts.values() for score in verdict[1:] if score is not None]
    numbers = [*case.box, *scores, *case.at_box.values()]
    if (
        not all(type(number) is int and number >= 0 for number in (case.image, case.object, case.label - 1))
        or not all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
        or set(verdicts) != set(READOUTS) or set(case.at_box) != {"conv", "fc"} or len(case.box) != 4
        or not all(verdict.outcome in OUTCOMES for verdict in verdicts.values())
        or verdicts[case.kind.head].score is None
    ):  # fmt: skip
        raise ValueError(f"a case of image {value['image']!r:.40} is invalid")
    return case
