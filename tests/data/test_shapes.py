"""The generated set: deterministic, boxes exact, and what its description promises."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from doublehead.config import DataConfig
from doublehead.data import DataError, build_dataset, shapes
from doublehead.data.shapes import CLASSES, MIN_VISIBLE, ShapesDataset

DIGEST = """
import hashlib
from doublehead.data.shapes import ShapesDataset
data = ShapesDataset("train", 50)
print(hashlib.sha256(b"".join(array.tobytes() for i in (0, 7, 49) for array in data.render(i))).hexdigest())
"""


def digest() -> str:
    data = ShapesDataset("train", 50)
    return hashlib.sha256(b"".join(array.tobytes() for i in (0, 7, 49) for array in data.render(i))).hexdigest()


def test_another_process_draws_the_same_bytes():
    other = subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest()


def test_a_picture_depends_on_seed_split_and_index_alone():
    data = ShapesDataset("train", 50)
    late, early = data[20][0], data[3][0]
    np.random.seed(5)
    torch.manual_seed(5)
    assert torch.equal(data[3][0], early) and torch.equal(data[20][0], late)  # no order, no global state
    assert torch.equal(ShapesDataset("train", 1000)[20][0], late)  # nor the length
    others = [data[4], ShapesDataset("val", 50)[3], ShapesDataset("train", 50, seed=1)[3]]
    assert not any(torch.equal(image, early) for image, _ in others)


@given(index=st.integers(0, 100_000), side=st.sampled_from([32, 97, 192]))
@settings(max_examples=80, deadline=None)
def test_boxes_are_tight_around_the_visible_pixels(index, side):
    _, boxes, labels, owner = ShapesDataset("train", index + 1, side).render(index)
    assert 1 <= len(boxes) == len(labels) <= 8 and owner.shape == (side, side)
    assert set(np.unique(owner)) - {-1} == set(range(len(boxes)))  # every shape is seen, every seen shape has a box
    for k, box in enumerate(boxes):
        y, x = np.where(owner == k)
        assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]


def test_the_pixels_are_where_the_boxes_say():
    """Painting changes the canvas on the shape's own pixels and at most in the four around them (a spike fades out)."""
    for seed in range(30):
        scene = shapes._Scene(np.random.default_rng(seed), 96)
        before = scene.canvas.copy()
        if not scene.add(seed % len(CLASSES), 40.0):
            continue
        change = np.abs(scene.canvas - before).max(0)
        mask = scene.owner == 0
        assert (change[mask] > 0).mean() > 0.99 and mask.sum() > 100
        outer = np.pad(mask, 4)
        near = np.any([outer[4 + dy :, 4 + dx :][:96, :96] for dy in range(-4, 5) for dx in range(-4, 5)], axis=0)
        assert (change[~near] == 0).all()


def test_no_shape_is_hidden_by_more_than_half(monkeypatch):
    drawn: list[int] = []
    place = shapes.random_distance

    def spy(*arguments):
        found = place(*arguments)
        drawn.append(int((found[0] <= 0).sum()))
        return found

    monkeypatch.setattr(shapes, "random_distance", spy)
    hidden = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        scene = shapes._Scene(rng, 128)
        areas = []
        for _ in range(40):
            if scene.add(int(rng.integers(6)), float(rng.uniform(12, 90))):
                areas.append(drawn[-1])
        visible = np.bincount(scene.owner[scene.owner >= 0], minlength=len(areas))
        assert len(areas) > 1 and (visible >= MIN_VISIBLE * np.array(areas)).all()
        hidden += list(1 - visible / areas)
    assert max(hidden) > 0.45 and np.mean(np.array(hidden) > 0.1) > 0.2  # occlusion does happen


@pytest.mark.parametrize("name", CLASSES)
def test_outlines_fit_the_unit_circle_and_differ(name):
    axis = np.linspace(-1.2, 1.2, 481, dtype=np.float32)
    u, v = axis[None, :], axis[:, None]
    masks = {kind: shapes.outline(kind, u, v) <= 0 for kind in CLASSES}
    reach = np.hypot(u, v)[masks[name]].max()
    assert 0.98 <= reach <= 1.005
    for other in set(CLASSES) - {name}:
        overlap = (masks[name] & masks[other]).sum() / (masks[name] | masks[other]).sum()
        assert overlap < 0.75


def test_what_a_set_holds():
    data = build_dataset(DataConfig(train_images=150, image_size=160), "train", horizontal_flip=0.5)
    assert len(data) == 150 and data.classes == list(CLASSES) and data.category_ids == [1, 2, 3, 4, 5, 6]
    assert data.image_sizes == [(160, 160)] * 150 and data.horizontal_flip == 0.5 and not data.skipped
    boxes, labels = [], []
    for index in range(150):
        image, target = data[index]
        assert image.dtype == torch.uint8 and image.shape == (3, 160, 160) and image.float().std() > 1
        assert target["image_id"] == data.image_ids[index]
        assert target["boxes"].dtype == torch.float32 and target["labels"].dtype == torch.int64
        boxes.append(target["boxes"])
        labels.append(target["labels"])
    corners, names = torch.cat(boxes), torch.cat(labels).bincount(minlength=7)
    assert corners.min() >= 0 and corners.max() <= 160
    sides = corners[:, 2:] - corners[:, :2]
    assert sides.min() >= 4 and (sides.max(1).values < 20).sum() > 50 and (sides.min(1).values > 80).sum() > 15
    assert names[0] == 0 and names[1:].min() > 0.6 * names[1:].max()
    assert {len(b) for b in boxes} == set(range(1, 9))


def test_default_lengths_and_bad_sizes():
    assert len(build_dataset(DataConfig(), "train")) == 4000 and len(build_dataset(DataConfig(), "val")) == 200
    with pytest.raises(DataError, match="image_size 31"):
        build_dataset(DataConfig(image_size=31), "val")
    with pytest.raises(DataError, match="its classes are disc"):
        build_dataset(DataConfig(), "val", classes=["disc"])
    assert build_dataset(DataConfig(), "val", classes=CLASSES).classes == list(CLASSES)


def test_ground_truth_scores_itself_perfect():
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    data = build_dataset(DataConfig(val_images=20), "val")
    truth = COCO()
    truth.dataset = data.coco_ground_truth()
    truth.createIndex()
    assert [image["id"] for image in truth.dataset["images"]] == data.image_ids
    found = [
        {"image_id": target["image_id"], "category_id": label, "score": 1.0, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        for _, target in (data[i] for i in range(20))
        for (x1, y1, x2, y2), label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True)
    ]
    assert len(found) == len(truth.dataset["annotations"])
    assert all(a["area"] == a["bbox"][2] * a["bbox"][3] and a["iscrowd"] == 0 for a in truth.dataset["annotations"])
    scores = COCOeval(truth, truth.loadRes(found), "bbox")
    scores.evaluate()
    scores.accumulate()
    scores.summarize()
    assert scores.stats[0] == pytest.approx(1.0)


@pytest.mark.parametrize("above, accepted", [(5, True), (6, False)])
def test_a_shape_more_than_half_beyond_the_border_is_not_painted(monkeypatch, above, accepted):
    scene = shapes._Scene(np.random.default_rng(0), 32)
    monkeypatch.setattr(shapes, "random_distance", lambda *_: (np.full((10, 10), -1.0), -above, 4))
    before = scene.canvas.copy()
    assert scene.add(0, 10.0) == accepted == (not np.array_equal(scene.canvas, before))
    assert (scene.owner == 0).sum() == (50 if accepted else 0)
