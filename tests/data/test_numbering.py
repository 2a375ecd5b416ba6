"""An evaluation does not depend on how the annotation file numbers its images, categories and annotations."""

from __future__ import annotations

import contextlib
import io
import json
import random

import numpy as np
import pytest
import torch

from doublehead.config import DataConfig
from doublehead.data import DataError, build_dataset
from doublehead.engine.evaluator import COCO_NUMBERS, coco_results, compute_metrics
from tests.support.data_samples import picture

NAMES = ("ant", "bee", "cow")
IMAGES, OBJECTS = 6, 18


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("numbering")
    for i in range(IMAGES):
        picture(root / "val" / f"{i}.png", 64, 64)
    (root / "annotations").mkdir()
    return root


def content(images, annotations, categories):
    """The same pictures and boxes under the given ids."""
    rng = np.random.default_rng(3)
    boxes = [[*map(float, rng.integers(0, 30, 2)), *map(float, rng.integers(8, 34, 2))] for _ in range(OBJECTS)]
    return {
        "images": [{"id": images[i], "file_name": f"{i}.png", "width": 64, "height": 64} for i in range(IMAGES)],
        "annotations": [
            {"id": annotations[k], "image_id": images[k % IMAGES], "category_id": categories[k % 3], "bbox": box,
             "area": box[2] * box[3], "iscrowd": int(k == 5)}
            for k, box in enumerate(boxes)
        ],
        "categories": [{"id": i, "name": name} for i, name in zip(categories, NAMES, strict=True)],
    }  # fmt: skip


def predictions(data, perfect: bool):
    """By image id: the boxes themselves, or moved ones whose scores are often equal, across images too."""
    found = {}
    for index, image_id in enumerate(data.image_ids):
        target = data[index][1]
        names = [data.classes[label - 1] for label in target["labels"].tolist()]
        order = sorted(range(len(names)), key=lambda i: target["boxes"][i].tolist())
        rng = np.random.default_rng(int(data.file_names[index][0]))
        boxes, scores = target["boxes"][order], torch.ones(len(order))
        if not perfect:
            boxes = boxes + torch.from_numpy(rng.integers(-3, 4, (len(order), 4))).float()
            boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
            scores = torch.from_numpy(rng.integers(1, 4, len(order)) / 4)
        found[image_id] = {"boxes": boxes, "labels": target["labels"][order], "scores": scores}
    return found


def measure(root, numbering, perfect: bool):
    (root / "annotations" / "instances_val.json").write_text(json.dumps(content(*numbering)))
    data = build_dataset(DataConfig("coco", str(root)), "val")
    results = coco_results(predictions(data, perfect), data)
    assert {r["image_id"] for r in results} <= set(numbering[0])  # the file's own ids, in what is written
    assert {r["category_id"] for r in results} <= set(numbering[2])
    return compute_metrics(data.coco_ground_truth(), results, data, voc=True), data, results


def numberings():
    """(images, annotations, categories): ordinary, from 0, negative, huge, sparse, in random order."""
    rng = random.Random(0)
    yield range(IMAGES), range(OBJECTS), range(3)
    yield range(-3, IMAGES - 3), range(-9, OBJECTS - 9), (1, 0, -1)
    yield [2**53 + i for i in range(IMAGES)], [2**53 + i for i in range(OBJECTS)], [2**53 + i for i in range(3)]
    yield [2**63 - 2 + i for i in range(IMAGES)], [2**64 * (i - 4) for i in range(OBJECTS)], [10**30, 0, -(10**30)]
    for _ in range(4):
        scale = rng.choice([40, 10**6, 2**61])
        yield tuple(rng.sample(range(-scale, scale), n) for n in (IMAGES, OBJECTS, 3))
        yield tuple(rng.sample(range(n), n) for n in (IMAGES, OBJECTS, 3))


ORDINARY = range(1, IMAGES + 1), range(1, OBJECTS + 1), range(1, 4)


@pytest.mark.parametrize("numbering", list(numberings()))
def test_any_numbering_gives_the_same_numbers(root, numbering):
    for perfect in (True, False):
        expected, _, _ = measure(root, ORDINARY, perfect)
        found, _, _ = measure(root, numbering, perfect)
        numbers = [expected[name] for name in COCO_NUMBERS]
        assert [found[name] for name in COCO_NUMBERS] == pytest.approx(numbers, abs=1e-12)
        assert found["classes"] == expected["classes"] and found["voc"]["classes"] == expected["voc"]["classes"]
        if perfect:
            assert found["AP"] == found["AP50"] == found["voc"]["mAP50"] == 1
        else:
            assert 0.05 < found["AP"] < 0.95


def test_the_ground_truth_can_be_given_to_pycocotools_itself(root):
    """Which takes a match with the annotation 0 for none."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    _, data, results = measure(root, (range(IMAGES), range(OBJECTS), range(3)), True)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = data.coco_ground_truth()
        truth.createIndex()
        scores = COCOeval(truth, truth.loadRes(results), "bbox")
        scores.evaluate()
        scores.accumulate()
        scores.summarize()
    assert scores.stats[0] == 1
    assert [a["id"] for a in truth.dataset["annotations"]] != [0] and 0 not in truth.anns
    _, data, _ = measure(root, (range(IMAGES), range(7, 7 + OBJECTS), range(3)), True)
    assert sorted(a["id"] for a in data.annotations()) == list(range(7, 7 + OBJECTS))  # kept where they can be


@pytest.mark.parametrize("value", [True, 1.5, "1", None, [1]])
def test_what_is_no_number_is_refused(root, value):
    images, annotations, categories = map(list, ORDINARY)
    for spoilt in ((value, *images[1:]), annotations, categories), (images, (value, *annotations[1:]), categories), (
        images, annotations, (value, *categories[1:]),
    ):  # fmt: skip
        with pytest.raises(DataError, match="an integer is accepted|is not among"):
            measure(root, spoilt, True)
