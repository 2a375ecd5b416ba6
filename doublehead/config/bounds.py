"""What a field accepts beyond its type, as metadata of `typing.Annotated`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bounds:
    """Limits of a number; None: no limit on that side."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    zero: bool = True
    """Whether 0 is accepted."""

    def accepts(self, value: float) -> bool:
        """Whether `value` lies within."""
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
            and (self.zero or value != 0)
        )

    def __str__(self) -> str:
        """The limits after a noun: "a whole number" + " of at least 1"."""
        if self.least is not None and self.most is not None:
            return f" from {self.least} to {self.most}"
        limits = {
            "of at least": self.least, "above": self.above, "of at most": self.most, "below": self.below,
            "other than": None if self.zero else 0,
        }  # fmt: skip
        said = [f"{word} {limit}" for word, limit in limits.items() if limit is not None]
        return f" {' and '.join(said)}" if said else ""


@dataclass(frozen=True)
class NotEmpty:
    """A list needs an item."""

    def accepts(self, value: tuple) -> bool:
        """Whether it has one."""
        return len(value) > 0

    def __str__(self) -> str:
        return " of at least 1"
