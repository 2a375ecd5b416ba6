"""A sheet of a data set's pictures with their boxes, in which every class has its turn."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw

from doublehead.data import DataError, DetectionDataset
from doublehead.engine.pictures import draw_boxes, drawing_font, shown_name, to_picture

COLUMNS, ROWS, SIDE, GAP, HEADER = 4, 4, 420, 12, 28


def choose_evenly(presence: np.ndarray, number: int, seed: int = 0) -> list[int]:
    """Images that show every class about as often: each time a random one of those with the class shown least.

    Args:
        presence: bool [images, classes]: which image shows which class.
        number: how many images; fewer if there are no more.

    Returns:
        Indices, in the order of choice; images without any class come last.
    """
    order = np.random.default_rng(seed).permutation(len(presence))
    left = np.ones(len(presence), bool)
    shown = np.zeros(presence.shape[1])
    chosen: list[int] = []
    while len(chosen) < min(number, len(presence)):
        available = (presence & left[:, None]).any(axis=0)
        if available.any():
            wanted = int(np.where(available, shown, np.inf).argmin())
            candidates = presence[order, wanted] & left[order]
        else:
            candidates = left[order]
        index = int(order[candidates.argmax()])
        left[index] = False
        shown += presence[index]
        chosen.append(index)
    return chosen


def draw_sheet(datasets: Mapping[str, DetectionDataset], number: int = COLUMNS * ROWS) -> tuple[Image.Image, list[str]]:
    """Pictures of each split with their boxes and names; three quarters are of the first split.

    Returns:
        The sheet, and why pictures that should be on it could not be read, a line each.
    """
    cells: list[tuple[str, Image.Image]] = []
    problems: list[str] = []
    for position, (split, dataset) in enumerate(datasets.items()):
        share = number - number // 4 if position == 0 and len(datasets) > 1 else number - len(cells)
        drawn = 0
        for index in choose_evenly(_presence(dataset), 2 * share):  # as many again, should some be unreadable
            if drawn == share:
                break
            try:
                picture, boxes = _draw(dataset, index)
            except DataError as error:
                problems.append(f"{split}: {error}")
                continue
            cells.append((f"{split}: {dataset.file_names[index]}{'' if boxes else ' (no box)'}", picture))
            drawn += 1
    return _arrange(cells), problems


def _presence(dataset: DetectionDataset) -> np.ndarray:
    rows = {image_id: row for row, image_id in enumerate(dataset.image_ids)}
    columns = {category: column for column, category in enumerate(dataset.category_ids)}
    presence = np.zeros((len(rows), len(columns)), bool)
    for entry in dataset.annotations():
        if not entry["iscrowd"]:
            presence[rows[entry["image_id"]], columns[entry["category_id"]]] = True
    return presence


def _draw(dataset: DetectionDataset, index: int) -> tuple[Image.Image, int]:
    """The picture with its boxes, and their number."""
    image, target = dataset[index]
    scale = SIDE / max(image.shape[-2:])
    size = [max(1, round(length * scale)) for length in (image.shape[-1], image.shape[-2])]
    picture = to_picture(image).resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)
    return draw_boxes(picture, target["boxes"] * scale, target["labels"], dataset.classes), len(target["boxes"])


def _arrange(cells: list[tuple[str, Image.Image]]) -> Image.Image:
    columns = max(1, min(COLUMNS, len(cells)))
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    heights = [HEADER + max(picture.height for _, picture in row) + GAP for row in rows]
    sheet = Image.new("RGB", (GAP + columns * (SIDE + GAP), max(1, sum(heights))), "white")
    draw, font, top = ImageDraw.Draw(sheet), drawing_font(15), 0
    for row, height in zip(rows, heights, strict=True):
        for column, (title, picture) in enumerate(row):
            left = GAP + column * (SIDE + GAP)
            draw.text((left, top + 5), _fitting(title, font), fill="black", font=font)
            sheet.paste(picture, (left, top + HEADER))
        top += height
    return sheet


def _fitting(title: str, font) -> str:
    """The title, its middle left out where it is too wide."""
    title = shown_name(title, len(title))
    short, keep = title, len(title)
    while font.getlength(short) > SIDE and keep > 8:
        keep -= 1
        short = f"{title[: keep // 2]}\N{HORIZONTAL ELLIPSIS}{title[len(title) - keep // 2 :]}"
    return short
