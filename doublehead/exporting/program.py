"""The exported program: the detector as a function of tensors, and an example input to trace and check it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..models import Detector, ImageBatch
from .description import OUTPUTS


class DetectorProgram(nn.Module):
    """(pixels, sizes) -> (boxes, scores, labels, count), computed by a copy of the detector.

    Args:
        detector: the static core.
        device: where the copy's weights go.
        plain: without fused operators and without skipping RoIs, which has the same results: only layers that other
            runtimes know.
    """

    def __init__(self, detector: Detector, device: str | torch.device = "cpu", plain: bool = False) -> None:
        super().__init__()
        self.detector = copy.deepcopy(detector).to(device).eval().requires_grad_(False)
        if plain:
            self.detector.readout = self.detector.readout.replace(skip=False)
            for head in self.detector.heads.values():
                head.tower.plain()

    def forward(self, pixels: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """
        Args:
            pixels: `Tensor[B, 3, H, W]`, normalised, zeros beyond each image.
            sizes: `Tensor[B, 2]`, (height, width) of each image in it, float32.

        Returns:
            boxes `Tensor[B, D, 4]`, scores `Tensor[B, D]`, labels `Tensor[B, D]` int64, count `Tensor[B]` int64.
        """
        return self.detector(ImageBatch(pixels, sizes))[: len(OUTPUTS)]


def example_input(
    batch: int, height: int, width: int, device: str | torch.device = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Random images with some padding, and their sizes; deterministic for a seed."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(batch, 3, height, width, generator=generator)
    sizes = torch.tensor([height, width]) - torch.arange(batch)[:, None] % 3 * 8
    sizes = sizes.clamp(min=1).to(torch.float32)
    for image, (used_height, used_width) in zip(pixels, sizes.int().tolist(), strict=True):
        image[:, used_height:] = 0
        image[:, :, used_width:] = 0
    return pixels.to(device), sizes.to(device)


def differences(found: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
    """Describe how two programs' detections differ beyond rounding; None: they do not.

    The order is ignored, as scores may be nearly equal.  So is one detection in fifty, which rounding may have moved
    across a threshold.
    """
    found, expected = ([tensor.cpu() for tensor in outputs] for outputs in (found, expected))
    for image, (number, wanted) in enumerate(zip(found[3].tolist(), expected[3].tolist(), strict=True)):
        boxes, scores, labels = (tensor[image, :number, None] for tensor in found[:3])
        wanted_boxes, wanted_scores, wanted_labels = (tensor[image, None, :wanted] for tensor in expected[:3])
        same = (labels == wanted_labels) & ((scores - wanted_scores).abs() < 1e-3)
        same &= ((boxes - wanted_boxes).abs() < 0.1).all(-1)
        extra, missing = int((~same.any(1)).sum()), int((~same.any(0)).sum())
        if max(extra, missing) > max(number, wanted) // 50:
            return f"of image {image}'s {wanted} detections {missing} are missing, and {extra} others are there"
    return None


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Convolutions without TF32, and deterministic: two programs that compute the same agree to rounding then.

    PyTorch's default on a GPU is TF32, whose rounding moves boxes by pixels and swaps detections of near scores.
    """
    conv, cudnn = torch.backends.cudnn.conv, torch.backends.cudnn
    before = conv.fp32_precision, cudnn.deterministic
    conv.fp32_precision, cudnn.deterministic = "ieee", True
    try:
        yield
    finally:
        conv.fp32_precision, cudnn.deterministic = before
