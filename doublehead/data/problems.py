"""The policy for bad records: an error, or left out, counted and summarised in one warning."""

from __future__ import annotations

import warnings
from collections import Counter

from ..errors import DataError
from .dataset import DataWarning

FEW = 3
"""The number of images, and of objects, that may always be left out, however small the set is; unless nothing would
remain, or the share is 0."""


class ObjectError(DataError):
    """A bad annotation, which does not affect its image."""


class Problems:
    """Bad records of one split.  The first is an error; or, with `skip`, they are counted up to a share of the set.

    Args:
        name: the data set's name, for messages.
        skip: leave bad records out.
        max_skipped: the largest share of the images, and of the objects, that may be left out.
    """

    def __init__(self, name: str, skip: bool, max_skipped: float = 1.0):
        self.name, self.skip, self.max_skipped = name, skip, max_skipped
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self.notes: Counter[str] = Counter()
        self._bad: dict[str, Counter[str]] = {"images": Counter(), "objects": Counter()}
        self._first: dict[tuple[str, str], str] = {}

    def report(self, error: DataError, *, of_object: bool = False) -> None:
        """Raise `error`, or count it."""
        if not self.skip:
            hint = "Correct it, or leave such records out with on_bad_record='skip' (--data.on-bad-record skip)."
            raise DataError(f"{error}. {hint}", error.reason) from error
        self.counts[error.reason] += 1
        self.first.setdefault(error.reason, str(error))
        what = "objects" if of_object or isinstance(error, ObjectError) else "images"
        self._bad[what][error.reason] += 1
        self._first.setdefault((what, error.reason), str(error))

    def note(self, what: str, where: str) -> None:
        """Count a record that is used anyway, or that no policy applies to."""
        self.notes[what] += 1
        self.first.setdefault(what, where)

    def check_shares(self, images: int, objects: int, complete: bool = True) -> None:
        """Compare what was left out with the good images and objects that were read.

        Args:
            complete: whether the file was read to its end; if not, annotations of unread images are not counted.

        Raises:
            DataError: nothing is left, or more than `max_skipped` was left out.
        """
        if not complete:
            self._bad["objects"].pop("unknown image", None)
        self._check_share("images", images)
        self._check_share("objects", objects)

    def most(self, total: int) -> float:
        """The number of images or objects that may be left out of `total`."""
        return max(FEW, self.max_skipped * total) if self.max_skipped else 0

    def _check_share(self, what: str, good: int) -> None:
        bad = self._bad[what].total()
        if not bad or (good and bad <= self.most(bad + good)):
            return
        reason, count = self._bad[what].most_common(1)[0]
        if good:
            share = f"no more than {self.max_skipped:.0%}" if self.max_skipped else "none"
            said = f"{bad} of {bad + good} {what} are bad records, and {share} may be left out"
            way_out = "Correct them, or allow a larger share with max_skipped (--data.max-skipped 0.5)"
        else:
            said = f"all {bad} {what} are bad records: nothing would be left"
            way_out = "Correct them, or see that data and detector belong together (root, split, classes)"
        first = self._first[what, reason]
        raise DataError(f"{self.name}: {said}; {count} x {reason}, first: {first}. {way_out}", reason)

    def warn(self) -> None:
        """Give one `DataWarning` for everything counted, if there is anything."""
        lines = [f"left out {count} x {reason}, first: {self.first[reason]}" for reason, count in self.counts.items()]
        lines += [f"{what.format(count)}, first: {self.first[what]}" for what, count in self.notes.items()]
        if lines:
            warnings.warn("\n  ".join([f"{self.name}:", *lines]), DataWarning, stacklevel=3)
