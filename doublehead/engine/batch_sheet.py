"""A sheet of the first training batches: what the model is shown, before hours are spent on it."""

from __future__ import annotations

import contextlib
import copy
import itertools
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from doublehead.data import DataWarning
from doublehead.engine.pictures import draw_boxes, drawing_font, save_picture, to_picture

BATCHES_FILE = "batches.png"
BATCHES = 2
MOST_IMAGES = 16
"""Of a larger batch this many are shown."""
COLUMNS = 4
SIDE = 300
_GAP, _HEADER, _CAPTION = 12, 34, 24


def draw_first_batches(batches: Callable[[Any], Iterable], dataset: Any, path: Path, first: int = 0) -> None:
    """Draw the next two batches of a training with their boxes, and leave the training as it is.

    Args:
        batches: gives the batches, those of the training to the bit, of the data set that it is called with.
        dataset: the training's; a copy of it counts what cannot be read.
        first: number of the first batch, from 0, as it is written above the pictures.

    Raises:
        DataError: an image cannot be used; the training would meet it at once.
        OSError: the file cannot be written.
    """
    apart = copy.copy(dataset)
    apart.skipped = Counter(dataset.skipped)
    with _same_randomness(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # the training itself warns of them
        shown = list(itertools.islice(batches(apart), BATCHES))
    save_picture(path, batch_sheet(shown, dataset.classes, first))


@contextlib.contextmanager
def _same_randomness() -> Iterator[None]:
    """Afterwards every random state of this process is as it was."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def batch_sheet(batches: Sequence[tuple[Sequence[Any], Sequence[Any]]], classes: Sequence[str], first: int = 0) -> Any:
    """Batches below each other, the pictures scaled to a common size, with their own size and number of boxes.

    Args:
        batches: (images, targets) each, as a training loader gives them.
        first: number of the first batch, from 0.
    """
    columns = max(1, min(COLUMNS, max((len(images) for images, _ in batches), default=1)))
    blocks = [_block(images, targets, classes, columns) for images, targets in batches]
    width = max([_GAP + columns * (SIDE + _GAP), *(block.width for block in blocks)])
    sheet = Image.new("RGB", (width, max(1, sum(_HEADER + block.height for block in blocks))), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for number, (block, (images, _)) in enumerate(zip(blocks, batches, strict=True), start=first + 1):
        part = f"{MOST_IMAGES} of its {len(images)} images" if len(images) > MOST_IMAGES else f"{len(images)} images"
        heading = f"training batch {number}, as the model gets it: {part}"
        draw.text((_GAP, top + 8), heading, fill="black", font=drawing_font(17))
        sheet.paste(block, (0, top + _HEADER))
        top += _HEADER + block.height
    return sheet


def _block(images: Sequence[Any], targets: Sequence[Any], classes: Sequence[str], columns: int) -> Image.Image:
    """The pictures of one batch in rows."""
    pairs = list(zip(images, targets, strict=True))[:MOST_IMAGES]
    tiles = [_tile(image, target, classes) for image, target in pairs]
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in row) + _GAP for row in rows]
    block = Image.new("RGB", (_GAP + columns * (SIDE + _GAP), sum(heights)), "white")
    for row, top in zip(rows, np.cumsum([0, *heights[:-1]]).tolist(), strict=True):
        for column, tile in enumerate(row):
            block.paste(tile, (_GAP + column * (SIDE + _GAP), top))
    return block


def _tile(image: Any, target: Any, classes: Sequence[str]) -> Image.Image:
    height, width = image.shape[-2:]
    scale = SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    picture = draw_boxes(to_picture(image).resize(size), target["boxes"] * scale, target["labels"], classes)
    tile = Image.new("RGB", (SIDE, picture.height + _CAPTION), "white")
    tile.paste(picture, (0, 0))
    boxes = len(target["boxes"])
    caption = f"{width} × {height}, {boxes} box{'' if boxes == 1 else 'es'}"
    ImageDraw.Draw(tile).text((0, picture.height + 3), caption, fill="black", font=drawing_font(13))
    return tile
