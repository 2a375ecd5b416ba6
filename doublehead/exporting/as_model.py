"""Exported programs where a model is expected: evaluation, detection in pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import UserError
from .loading import ExportedDetector, resized

if TYPE_CHECKING:
    from ..models import DoubleHeadRCNN

Size = tuple[int, int]
Outputs = list[dict[str, Tensor]]


class ExportedModel(nn.Module):
    """An exported detector as a module: images in, detections out, as `DoubleHeadRCNN` in evaluation mode."""

    def __init__(self, detector: ExportedDetector) -> None:
        super().__init__()
        self.exported = detector
        self.place = nn.Parameter(torch.empty(0, device=detector.device), requires_grad=False)
        """Tells where it runs to those who ask a module's parameters."""

    def forward(self, images: Sequence[Tensor]) -> Outputs:
        """
        Args:
            images: up to as many as the program takes, each `Tensor[3, H, W]`.

        Raises:
            UserError: an image is larger than the program's input after resizing.
        """
        for image in images:
            if (problem := self.too_large(*image.shape[-2:])) is not None:
                raise UserError(f"an image {problem}")
        return self.exported.detect(images)

    def too_large(self, height: int, width: int) -> str | None:
        """Why an image of this size cannot go through the program; None: it can."""
        _, most_height, most_width = self.exported.shape
        new_height, new_width = self.exported.resized(height, width)
        if new_height <= most_height and new_width <= most_width:
            return None
        return (
            f"of {width}x{height} (width x height) becomes {new_width}x{new_height}, and the program takes up to "
            f"{most_width}x{most_height}: export it with a larger --height and --width, the longer side for both to "
            "serve landscape and portrait"
        )


class TranslatedModel(nn.Module):
    """A model that runs image by image as programs, which are made when images need them.

    The first landscape image's program is of its own size, as pictures of one camera all have it; the first that is
    larger has one made for every landscape image.  So it is with portrait ones.

    Args:
        model: supplies the preprocessing.
        make: (height, width) of the padded pixels -> the program for it.
    """

    def __init__(self, model: DoubleHeadRCNN, make: Callable[[int, int], ExportedDetector]) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)
        self._config, self._make = model.transform.config, make
        self._programs: dict[bool, dict[Size, ExportedDetector]] = {True: {}, False: {}}

    def forward(self, images: Sequence[Tensor]) -> Outputs:
        """
        Args:
            images: each `Tensor[3, H, W]`.
        """
        return [output for image in images for output in self._program(*image.shape[-2:]).detect([image])]

    def _program(self, height: int, width: int) -> ExportedDetector:
        programs = self._programs[width >= height]
        own = self._padded(*resized(self._config, height, width))
        for size, program in programs.items():
            if own[0] <= size[0] and own[1] <= size[1]:
                return program
        size = self._largest(width >= height) if programs else own
        programs[size] = self._make(*size)
        return programs[size]

    def _largest(self, landscape: bool) -> Size:
        """The padded size that holds every image of this format."""
        sides = sorted(self._padded(self._config.min_size[-1], self._config.max_size))
        return (sides[0], sides[1]) if landscape else (sides[1], sides[0])

    def _padded(self, height: int, width: int) -> Size:
        step = self._config.size_divisible
        return math.ceil(height / step) * step, math.ceil(width / step) * step
