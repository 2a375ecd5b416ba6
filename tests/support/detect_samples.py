"""What the tests of `doublehead detect` share: a saved stand-in of a detector, and pictures."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from doublehead.engine import checkpoint
from doublehead.recipes import RECIPES
from tests.support.engine_standin import TinyDetector

CLASSES = ["cat", "dog"]


def save_tiny_detector(folder):
    """The folder of a "run" with a `TinyDetector`."""
    torch.manual_seed(0)
    folder.mkdir()
    checkpoint.save_model(folder / "model.safetensors", TinyDetector(3), RECIPES["shapes-ext"], CLASSES, [1, 2])
    return folder


def many(folder, count=9):
    """Pictures of several sizes, shapes and formats, with a broken one after each third."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for number in range(count):
        height, width = 30 + 7 * (number % 4), 40 + 5 * (number % 3)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        exif = Image.Exif()
        exif[0x0112] = 1 + number % 8
        Image.fromarray(pixels).save(folder / f"{number}.{('jpg', 'png', 'webp')[number % 3]}", exif=exif)
        if number % 3 == 2:
            (folder / f"{number}b.jpg").write_bytes((folder / f"{number - 2}.jpg").read_bytes()[:-30])
    return folder
