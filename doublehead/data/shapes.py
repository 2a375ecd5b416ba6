"""The built-in data set: generated images of six shapes, without downloads or files.

Image i of a split depends only on (seed, split, i).  The background is plain, a gradient, stripes or blotches.  It has
one to eight shapes, tilted by up to 22.5 degrees, from 16 pixels to 0.7 of the image in size, plain, shaded or striped,
which may overlap each other and the border.  Noise covers everything.

A box is the tight box of the visible pixels; a pixel counts if the shape covers at least half of it.  No shape is
placed such that more than half of any shape is hidden.  So every shape in the image is annotated, and every box is
exact.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .dataset import DetectionDataset, Target, make_target

CLASSES = ("disc", "square", "triangle", "ring", "cross", "star")
MAX_OBJECTS = 8
MIN_EXTENT = 16.0
"""Smallest diameter in pixels; the largest is `MAX_EXTENT` of the image's side."""
MAX_EXTENT = 0.7
MAX_TILT = np.pi / 8
"""Radians in both directions; small enough for a small detector to tell the classes after minutes of training."""
MIN_VISIBLE = 0.5
CONTRAST = 80.0
"""Minimum distance in RGB between a shape's colour and the background's mean colour."""


class ShapesDataset(DetectionDataset):
    """Generated images of shapes; see the module's docstring.

    Args:
        split: any name; different names give different images.
        length: number of images.
        side: height and width in pixels, at least 32.
        seed: different seeds give different images.
    """

    def __init__(self, split: str, length: int, side: int = 192, horizontal_flip: float = 0.0, seed: int = 0):
        if side < 32:
            raise DataError(f"shapes: image_size {side} is too small, at least 32 pixels are accepted")
        if length < 1:
            raise DataError(f"shapes, split '{split}': {length} images asked for, at least 1 is accepted")
        self.name = f"shapes ({split})"
        self.classes = list(CLASSES)
        self.category_ids = list(range(1, len(CLASSES) + 1))
        self.image_ids = list(range(1, length + 1))
        self.file_names = [f"{split}-{i:06d}.png" for i in self.image_ids]
        self.image_sizes = [(side, side)] * length
        self.horizontal_flip = horizontal_flip
        self.skipped, self.unused = Counter(), Counter()
        self._side = side
        self._entropy = (seed, *split.encode())

    def load(self, index: int) -> tuple[Tensor, Target]:
        image, boxes, labels, _ = self.render(index)
        return torch.from_numpy(image), make_target(boxes, labels, self.image_ids[index])

    def render(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Pixels uint8 [3, H, W], boxes [n, 4], labels [n], and each pixel's shape, int [H, W], -1 for none."""
        return draw_scene(np.random.default_rng((index, *self._entropy)), self._side)

    def annotations(self) -> list[dict[str, Any]]:
        """See `DetectionDataset`; this draws the whole split once."""
        found: list[dict[str, Any]] = []
        for index, image_id in enumerate(self.image_ids):
            _, boxes, labels, _ = self.render(index)
            for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist(), strict=True):
                box = [x1, y1, x2 - x1, y2 - y1]
                found.append({"id": len(found) + 1, "image_id": image_id, "category_id": label, "bbox": box,
                              "area": box[2] * box[3], "iscrowd": 0})  # fmt: skip
        return found


def draw_scene(rng: np.random.Generator, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One image of `side` x `side` pixels; returns the same values as `ShapesDataset.render`."""
    scene = _Scene(rng, side)
    for _ in range(int(rng.integers(1, MAX_OBJECTS + 1))):
        kind, extent = int(rng.integers(len(CLASSES))), _log_uniform(rng, MIN_EXTENT, MAX_EXTENT * side)
        placed = any(scene.add(kind, extent) for _ in range(8))
        # A crowded image may have no room left; an empty one always has, so try until there is one shape.
        while not placed and not scene.labels:
            placed = scene.add(kind, extent)
    return scene.finish()


class _Scene:
    """An image being drawn, and the shape of each pixel."""

    def __init__(self, rng: np.random.Generator, side: int):
        first = rng.uniform(30, 225, 3)
        second = np.clip(first + rng.uniform(-60, 60, 3), 0, 255)
        self.rng, self.side = rng, side
        self.background = (first + second) / 2
        self.canvas = _texture(rng, (side, side), first, second)
        self.owner = np.full((side, side), -1, np.int8)
        self.labels: list[int] = []
        self.spare = np.empty(0)  # the number of pixels of each shape that may still be hidden

    def add(self, kind: int, extent: float) -> bool:
        """Try one random position and rotation; False, without drawing, if too much would be hidden."""
        distance, top, left = random_distance(self.rng, kind, extent, self.side)
        area = int((distance <= 0).sum())
        inside = (slice(max(top, 0), top + len(distance)), slice(max(left, 0), left + len(distance)))
        distance = distance[max(-top, 0) : self.side - top, max(-left, 0) : self.side - left]
        mask = distance <= 0
        spare = (1 - MIN_VISIBLE) * area - (area - mask.sum())
        hidden = np.bincount(self.owner[inside][mask] + 1, minlength=len(self.labels) + 1)[1:]
        if spare < 0 or (hidden > self.spare).any():
            return False
        patch = self.canvas[(slice(None), *inside)]
        patch += np.clip(0.5 - distance, 0, 1) * (_fill(self.rng, distance.shape, self.background) - patch)
        self.owner[inside][mask] = len(self.labels)
        self.labels.append(kind + 1)
        self.spare = np.append(self.spare - hidden, spare)
        return True

    def finish(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        noise = self.rng.random(self.canvas.shape, dtype=np.float32) - np.float32(0.5)
        noise *= np.float32(self.rng.uniform(4, 24))
        noise += self.canvas
        boxes = [_tight_box(self.owner == k) for k in range(len(self.labels))]
        pixels = np.clip(noise, 0, 255, out=noise).astype(np.uint8)
        return pixels, np.array(boxes, np.float32), np.array(self.labels, np.int64), self.owner


def random_distance(rng: np.random.Generator, kind: int, extent: float, side: int) -> tuple[np.ndarray, int, int]:
    """A randomly placed shape: signed distance to its outline in pixels (negative inside) on a square patch, and the
    patch's top and left."""
    radius = extent / 2
    centre_x, centre_y = rng.uniform(0.5 * radius, side - 0.5 * radius, size=2)
    angle, stretch = rng.uniform(-MAX_TILT, MAX_TILT), rng.uniform(0.75, 1.0)
    top, left = int(np.floor(centre_y - radius)) - 1, int(np.floor(centre_x - radius)) - 1
    steps = np.arange(int(np.ceil(extent)) + 3, dtype=np.float32) + 0.5
    x = ((steps + np.float32(left - centre_x)) / np.float32(radius))[None, :]
    y = ((steps + np.float32(top - centre_y)) / np.float32(radius))[:, None]
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u, v = cos * x + sin * y, (cos * y - sin * x) / np.float32(stretch)
    return outline(CLASSES[kind], u, v) * np.float32(radius), top, left


def outline(name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance to a shape that is inscribed in the unit circle."""
    if name == "disc":
        return np.hypot(u, v) - 1
    if name == "ring":
        return np.abs(np.hypot(u, v) - 0.76) - 0.24
    if name == "square":
        return np.maximum(np.abs(u), np.abs(v)) - np.float32(0.7071)
    if name == "triangle":
        slope = np.float32(0.8660)
        return np.maximum(slope * np.abs(u) - 0.5 * v, v) - 0.5
    if name == "cross":
        a, b = np.abs(u), np.abs(v)
        return np.minimum(np.maximum(a - 0.95, b - 0.28), np.maximum(b - 0.95, a - 0.28))
    # star: fold the plane onto half a spike; its edge runs from the tip (1, 0) to the notch at 36 degrees.
    turn = np.float32(np.pi / 5)
    angle = np.abs(np.mod(np.arctan2(v, u) + turn, 2 * turn) - turn)
    r = np.hypot(u, v)
    notch_x, notch_y = 0.42 * np.cos(turn), 0.42 * np.sin(turn)
    normal = np.array([notch_y, 1 - notch_x], np.float32) / np.float32(np.hypot(notch_y, 1 - notch_x))
    return normal[0] * (r * np.cos(angle) - 1) + normal[1] * (r * np.sin(angle))


def _fill(rng: np.random.Generator, shape: tuple[int, ...], background: np.ndarray) -> np.ndarray:
    colour = rng.uniform(0, 255, 3)
    while np.linalg.norm(colour - background) < CONTRAST:
        colour = rng.uniform(0, 255, 3)
    return _texture(rng, shape, colour, np.clip(colour * rng.uniform(0.7, 1.15), 0, 255))


def _texture(rng: np.random.Generator, shape: tuple[int, ...], first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """A mixture of two colours, float32 [3, H, W]: plain, gradient, stripes or blotches."""
    height, width = shape
    kind, angle, phase = int(rng.integers(4)), rng.uniform(0, 2 * np.pi), rng.uniform(0, 2 * np.pi)
    x, y = np.arange(width, dtype=np.float32)[None, :], np.arange(height, dtype=np.float32)[:, None]
    along = np.float32(np.cos(angle)) * x + np.float32(np.sin(angle)) * y
    if kind == 0:
        mix = np.zeros((height, width), np.float32)
    elif kind == 1:
        mix = (along - along.min()) / max(float(np.ptp(along)), 1.0)
    elif kind == 2:
        mix = 0.5 + 0.5 * np.sin(along * np.float32(2 * np.pi / _log_uniform(rng, 5, 40)) + np.float32(phase))
    else:
        mix = _blotches(rng, height, width)
    return first.astype(np.float32)[:, None, None] + mix * (second - first).astype(np.float32)[:, None, None]


def _blotches(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A coarse random grid, interpolated linearly."""
    cells = 12
    grid = rng.random((cells, cells), dtype=np.float32)
    return _stretch(_stretch(grid, height).T, width).T


def _stretch(rows: np.ndarray, length: int) -> np.ndarray:
    position = np.linspace(0, len(rows) - 1, length, dtype=np.float32)
    low = np.minimum(position.astype(np.int64), len(rows) - 2)
    weight = (position - low)[:, None]
    return (1 - weight) * rows[low] + weight * rows[low + 1]


def _tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))
