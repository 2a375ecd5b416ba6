"""Between a user's images and the padded batch the detector works on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ..config import ImageConfig
from .structures import Detections, ImageBatch, Targets, pad_targets

Size = tuple[int, int]


class ImageTransform(nn.Module):
    """Normalise, resize and pad a list of images; carry boxes there and back.

    The arithmetic follows torchvision's `GeneralizedRCNNTransform`, so that its weights see the
    same pixels.
    """

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.tensor(config.mean).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).reshape(3, 1, 1), persistent=False)

    def forward(self, images: Sequence[Tensor]) -> tuple[ImageBatch, list[Size]]:
        """Turn images into a batch.

        Args:
            images: each `Tensor[3, H, W]`, RGB, float in 0..1 or uint8.

        Returns:
            The batch, and each image's (height, width) in it.

        Raises:
            ValueError: no image, or one of another shape or dtype.
        """
        if len(images) == 0:
            raise ValueError("images: expected at least one image, got an empty list")
        resized = [self._resize(self._normalise(image, row)) for row, image in enumerate(images)]
        sizes: list[Size] = [(image.shape[1], image.shape[2]) for image in resized]
        step = self.config.size_divisible
        height, width = (math.ceil(max(extent) / step) * step for extent in zip(*sizes, strict=True))
        pixels = resized[0].new_zeros(len(images), 3, height, width)
        for row, image in enumerate(resized):
            pixels[row, :, : image.shape[1], : image.shape[2]] = image
        return ImageBatch(pixels, torch.tensor(sizes, dtype=torch.float32).to(pixels.device)), sizes

    def targets(self, targets: Sequence[dict[str, Tensor]], before: Sequence[Size], after: Sequence[Size]) -> Targets:
        """Scale ground-truth boxes from the users' images (`before`) to the batch (`after`) and pad them."""
        device = self.mean.device
        boxes = [
            target["boxes"].to(device, torch.float32) * _scale(old, new, device)
            for target, old, new in zip(targets, before, after, strict=True)
        ]
        return pad_targets(boxes, [target["labels"].to(device) for target in targets])

    def detections(self, detections: Detections, before: Sequence[Size], after: Sequence[Size]) -> list[dict]:
        """Cut a padded result into one dict per image, boxes in the users' images' pixels.

        The only place of inference that waits for the device: the counts must be known.
        """
        results = []
        for row, count in enumerate(detections.count.tolist()):
            scale = _scale(after[row], before[row], detections.boxes.device)
            results.append(
                {
                    "boxes": detections.boxes[row, :count] * scale,
                    "labels": detections.labels[row, :count],
                    "scores": detections.scores[row, :count],
                }
            )
        return results

    def _normalise(self, image: Tensor, row: int) -> Tensor:
        if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise ValueError(f"images[{row}]: expected a Tensor[3, H, W], got shape {tuple(image.shape)}")
        image = image.to(self.mean.device, non_blocking=True)
        if image.dtype == torch.uint8:
            image = image.to(self.mean.dtype) / 255
        elif not image.is_floating_point():
            raise ValueError(f"images[{row}]: expected uint8 or a floating dtype in 0..1, got {image.dtype}")
        return (image - self.mean) / self.std

    def _resize(self, image: Tensor) -> Tensor:
        sides = self.config.min_size
        side = sides[int(torch.randint(len(sides), ()))] if self.training and len(sides) > 1 else sides[-1]
        short, long = min(image.shape[1:]), max(image.shape[1:])
        factor = min(side / short, self.config.max_size / long)
        return interpolate(image[None], scale_factor=factor, mode="bilinear", recompute_scale_factor=True)[0]


def _scale(old: Size, new: Size, device: torch.device) -> Tensor:
    y, x = new[0] / old[0], new[1] / old[1]
    return torch.tensor([x, y, x, y], dtype=torch.float32).to(device)
