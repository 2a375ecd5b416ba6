"""A detector small enough for tests of the engine: the models' interface, not their maths.

Run as a program it is `doublehead.train` with this detector:
`python engine_standin.py --data.train-images 8 ...`.
"""

from __future__ import annotations

import sys
import types

import torch
import torch.nn.functional as F
from torch import nn


class TinyDetector(nn.Module):
    """Finds at most one box per class; in training it draws random numbers, as the real one does."""

    def __init__(self, num_classes: int, width: int = 8) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1), nn.ReLU()
        )
        self.classify = nn.Linear(width * 16, num_classes)
        self.locate = nn.Linear(width * 16, 4 * num_classes)

    def forward(self, images, targets=None):
        if targets is None:
            return [self._detect(image) for image in images]
        losses = [self._losses(image, target) for image, target in zip(images, targets, strict=True)]
        return {name: torch.stack([loss[name] for loss in losses]).mean() for name in losses[0]}

    def _outputs(self, image):
        x = self.features(F.interpolate(image[None].float() / 255, (32, 32), mode="bilinear"))
        x = F.adaptive_avg_pool2d(x, 4).flatten(1)
        if self.training:
            x = x * (torch.rand(x.shape, device=x.device) > 0.1)
        return self.classify(x)[0], self.locate(x)[0].view(self.num_classes, 4)

    def _losses(self, image, target):
        logits, boxes = self._outputs(image)
        label = target["labels"][:1]
        size = image.shape[-1]
        return {
            "loss_cls": F.cross_entropy(logits[None].float(), label),
            "loss_box": F.smooth_l1_loss(boxes[label].float(), target["boxes"][:1] / size),
        }

    def _detect(self, image):
        logits, boxes = self._outputs(image)
        height, width = image.shape[-2:]
        scale = torch.tensor([width, height, width, height], device=image.device)
        corners = boxes[1:].sigmoid().view(-1, 2, 2).sort(dim=1).values.reshape(-1, 4) * scale
        return {"boxes": corners, "labels": torch.arange(1, self.num_classes), "scores": logits.softmax(0)[1:]}


def build_detector(config, num_classes):
    return TinyDetector(num_classes)


if __name__ == "__main__":
    torch.set_num_threads(1)
    models = types.ModuleType("doublehead.models")
    models.build_detector = build_detector
    sys.modules["doublehead.models"] = models
    from doublehead.train import main

    main()
