"""The sheet of the first training batches: the training's own batches, and a training that does not notice."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from doublehead.data import build_loader
from doublehead.engine import batch_sheet
from doublehead.engine.batch_sheet import SIDE, draw_first_batches
from doublehead.engine.pictures import class_colour
from tests.support.engine_standin import MemoryDataset


def dataset(count=7, flip=0.5):
    images = [torch.full((3, 30, 60), 10 * i, dtype=torch.uint8) for i in range(count)]
    made = MemoryDataset(
        images, [{"image_id": 10 * i + 7, "bbox": [3.0, 5, 20, 15], "category_id": 2} for i in range(count)]
    )
    made.horizontal_flip = flip
    return made


def loader(data):
    return build_loader(data, 3, train=True, seed=5)


def random_states():
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()


def test_it_shows_the_batches_of_the_training_and_changes_nothing(tmp_path, monkeypatch):
    data, seen = dataset(), []
    real = batch_sheet.batch_sheet
    monkeypatch.setattr(batch_sheet, "batch_sheet", lambda batches, *more: seen.extend(batches) or real(batches, *more))

    def batches(apart):
        for images, targets in loader(apart):
            apart.skipped["unreadable"] += 1
            torch.rand(1), np.random.rand(), random.random()  # as an augmentation may
            yield images, targets

    before = random_states()
    draw_first_batches(batches, data, tmp_path / "batches.png")
    assert random_states() == before and data.skipped == Counter()
    trained = iter(loader(data))
    assert len(seen) == 2
    for images, targets in seen:
        own_images, own_targets = next(trained)
        assert all(torch.equal(one, own) for one, own in zip(images, own_images, strict=True))
        assert all(torch.equal(one["boxes"], own["boxes"]) for one, own in zip(targets, own_targets, strict=True))
    boxes = torch.cat([target["boxes"] for _, targets in seen for target in targets])
    assert len(boxes.unique(dim=0)) == 2  # some are mirrored


def test_boxes_lie_where_they_are_in_the_scaled_picture(tmp_path):
    draw_first_batches(loader, dataset(flip=0.0), tmp_path / "batches.png")
    with Image.open(tmp_path / "batches.png") as sheet:
        pixels = np.array(sheet)
    spots = np.argwhere((pixels == class_colour(1)).all(axis=2))
    scale, left, top = SIDE / 60, 12, 34
    first = spots[(spots[:, 1] < left + SIDE) & (spots[:, 0] < top + SIDE // 2)]
    assert abs(first[:, 1].max() - left - 23 * scale) <= 1 and abs(first[:, 0].max() - top - 20 * scale) <= 1


@pytest.mark.parametrize("size", [1, 3, 40])
def test_batches_of_any_size(size):
    images = [torch.zeros(3, 1 if i % 2 else 2000, 300, dtype=torch.uint8) for i in range(size)]
    target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    sheet = batch_sheet.batch_sheet([(images, [target] * size)] * 2, ["a"])
    assert sheet.width < 1300 and sheet.height < 3200
