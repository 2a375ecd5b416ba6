"""The best weights of a run so far, by AP: `best.safetensors` beside the last ones.

What is best stands in the file's own header (its step and AP, and on which images they were measured), so that it is
known after a resume, and can never belong to other weights.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import safetensors

from doublehead.data import DetectionDataset
from doublehead.engine.logs import say
from doublehead.engine.resume import digest_of_images

BEST_FILE = "best.safetensors"
_AP, _IMAGES = "validation_ap", "validation_images"


class Best:
    """Which step was best; the weights are written by the caller.

    Args:
        path: the file of the best weights.
        validation: the images on which AP is measured.
    """

    def __init__(self, path: Path, validation: DetectionDataset) -> None:
        self.path, self._images = path, digest_of_images(validation)
        self.step, self.ap = 0, -math.inf

    def read(self) -> None:
        """Take over what an earlier part of the run left."""
        if not self.path.exists():
            return
        try:
            with safetensors.safe_open(self.path, framework="pt") as file:
                header = file.metadata() or {}
            step, ap, images = int(header["step"]), float(header[_AP]), header[_IMAGES]
        except (OSError, KeyError, ValueError, safetensors.SafetensorError):
            say(f"note: {self.path}: not the best weights of a run, or damaged: the next evaluation replaces it")
            return
        if images != self._images:
            say(
                f"note: {self.path}: its AP was measured on other validation images and cannot be compared: the next "
                "evaluation replaces it"
            )
            return
        self.step, self.ap = step, ap

    def is_beaten_by(self, step: int, ap: float | None) -> bool:
        """Whether the weights of `step` are to be kept: a higher AP, or the same step, measured again.

        None, where there is nothing to find, is no AP.
        """
        return ap is not None and (ap > self.ap or step == self.step)

    def replaced_by(self, step: int, ap: float) -> dict[str, str]:
        """Note that this step is the best now; returns the entries of its file's header."""
        self.step, self.ap = step, ap
        return {_AP: repr(float(ap)), _IMAGES: self._images}

    def as_metrics(self) -> dict[str, Any]:
        """For `metrics.json`: empty if nothing was kept."""
        return {"best": {"step": self.step, "AP": self.ap}} if self.ap > -math.inf else {}

    def describe(self) -> str:
        """One line for the end of a run; empty if nothing was kept."""
        return f"{self.path.name} is of step {self.step}, AP {100 * self.ap:.1f}" if self.ap > -math.inf else ""
