"""A short training and its batches."""

from __future__ import annotations

import torch

from doublehead.config import TrainConfig

CONFIG = TrainConfig(steps=6, batch_size=4, lr=0.05, milestones=(4,), warmup_steps=2, log_every=2, device="cpu")


def batches(start=0, size=4):
    """Micro-batch k holds images k * size ...; every image is a function of its number."""
    number = start * size
    while True:
        images, targets = [], []
        for i in range(number, number + size):
            generator = torch.Generator().manual_seed(i)
            images.append(torch.randint(0, 256, (3, 40, 40), generator=generator, dtype=torch.uint8))
            box = torch.tensor([[4.0, 5.0, 20.0 + i % 7, 30.0]])
            targets.append({"boxes": box, "labels": torch.tensor([1 + i % 2]), "image_id": i})
        number += size
        yield images, targets
