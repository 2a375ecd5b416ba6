"""Right and wrong detections: the best F1 and the confusion matrix, against cases done by hand."""

import numpy as np
import pytest
import torch

from doublehead.engine.coco_metrics import detailed_metrics
from doublehead.engine.matching import Ranking, best_f1, confusion_matrix, rates
from doublehead.engine.metrics_text import format_metrics
from tests.support.engine_standin import MemoryDataset

A, B = 2, 5  # category ids of the classes a and b


def box(image, x, category, **more):
    """A box of 10 x 10 pixels at x."""
    return {"image_id": 10 * image + 7, "bbox": [float(x), 0.0, 10.0, 10.0], "category_id": category, **more}


def measured(truths, detections, classes=2, images=2):
    dataset = MemoryDataset([torch.zeros(3, 20, 200, dtype=torch.uint8)] * images, truths, classes)
    return detailed_metrics(dataset.coco_ground_truth(), detections, dataset, voc=False)


def hand_made():
    """Two images; by falling score: right, wrong (elsewhere), on the crowd, right, wrong class, doubled, right."""
    truths = [
        box(0, 0, A), box(0, 30, A), box(0, 60, B), box(0, 100, A, iscrowd=1), box(1, 0, B), box(1, 50, A),
    ]  # fmt: skip
    detections = [
        box(0, 1, A, score=0.9),  # the first a
        box(1, 150, B, score=0.8),  # nothing there
        box(0, 102, A, score=0.75),  # on the crowd: neither right nor wrong
        box(0, 61, B, score=0.7),  # the first b
        box(1, 0, A, score=0.6),  # a b taken for an a
        box(0, 2, A, score=0.5),  # the first a again
        box(1, 51, A, score=0.4),  # the last a
        box(0, 103, B, score=0.3),  # on a crowd of another class: wrong
    ]
    return truths, detections


def test_the_ranking_and_the_best_f1_by_hand():
    metrics, details = measured(*hand_made())
    assert details.ranking.wanted == 5
    assert details.ranking.scores.tolist() == [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
    assert details.ranking.hits.tolist() == [True, False, True, False, False, True, False]
    # F1 = 2 right / (shown + wanted): 2/6, 2/7, 4/8, 4/9, 4/10, 6/11, 6/12
    assert rates(details.ranking).f1 == pytest.approx([2 / 6, 2 / 7, 4 / 8, 4 / 9, 4 / 10, 6 / 11, 6 / 12])
    assert metrics["best_f1"] == {"threshold": 0.4, "f1": pytest.approx(6 / 11), "precision": 0.5, "recall": 0.6}
    assert details.best_f1 == metrics["best_f1"]
    assert "best F1 at IoU 0.5: 54.5, of scores from 0.4 on (precision 50.0, recall 60.0)" in format_metrics(metrics)


def test_the_confusion_by_hand():
    _, details = measured(*hand_made())
    # Rows a, b, background; columns a, b, missed. From score 0.4 on, so without the b on the crowd of a.
    assert details.confusion.tolist() == [[2, 0, 1], [1, 1, 0], [1, 1, 0]]


def confusion(truths, detections, threshold=0.5):
    numbered = [[entry | {"category_id": (entry["category_id"] + 1) // 3} for entry in one]
                for one in (truths, detections)]  # fmt: skip
    return confusion_matrix(*numbered, 2, threshold).tolist()


def test_the_best_score_takes_the_box_it_overlaps_most_whatever_its_class():
    truths = [box(0, 0, A), box(0, 3, B)]
    assert confusion(truths, [box(0, 1, B, score=0.9)]) == [[0, 1, 0], [0, 0, 1], [0, 0, 0]]  # 1 pixel off, not 2
    assert confusion(truths, [box(0, 1, B, score=0.9), box(0, 1, A, score=0.8)]) == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
    last_first = [box(0, 1, A, score=0.8), box(0, 1, B, score=0.9)]
    assert confusion(truths, last_first) == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
    doubled = [box(0, 0, A, score=0.9), box(0, 0, A, score=0.95)]
    assert confusion(truths[:1], doubled) == [[1, 0, 0], [0, 0, 0], [1, 0, 0]]


def test_iou_and_threshold_count_from_their_values_on():
    half = [box(0, 0, A, score=0.5) | {"bbox": [0.0, 0.0, 10.0, 5.0]}]  # IoU and score 0.5
    assert confusion([box(0, 0, A)], half) == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert confusion([box(0, 0, A)], half, 0.51) == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]
    less = [half[0] | {"bbox": [0.0, 0.0, 10.0, 4.9]}]
    assert confusion([box(0, 0, A)], less) == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    assert confusion([box(1, 0, A)], half) == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]  # another image


def test_detections_on_crowds_of_their_class_are_left_out_in_any_number():
    crowd = [box(0, 0, A, iscrowd=1) | {"bbox": [0.0, 0.0, 100.0, 10.0]}]
    found = [box(0, x, A, score=0.9) for x in (0, 30, 70)] + [box(0, 40, B, score=0.8), box(0, 150, A, score=0.7)]
    assert confusion(crowd, found) == [[0, 0, 0], [0, 0, 0], [1, 1, 0]]


def test_every_box_and_detection_is_counted_once():
    rng = np.random.default_rng(3)
    truths = [box(i % 5, int(rng.integers(0, 180)), (A, B)[i % 2]) for i in range(60)]
    found = [box(int(rng.integers(5)), int(rng.integers(0, 180)), (A, B)[i % 2], score=rng.random()) for i in range(90)]
    _, details = measured(truths, found, images=5)
    shown = [d for d in found if d["score"] >= details.best_f1["threshold"]]
    assert details.confusion.sum(axis=1)[:2].tolist() == [30, 30]
    assert details.confusion.sum(axis=0)[:2].tolist() == [sum(d["category_id"] == c for d in shown) for c in (A, B)]


def test_detections_of_equal_score_come_together():
    ranked = Ranking(np.array([0.9, 0.5, 0.5, 0.5]), np.array([True, True, False, False]), 2)
    assert rates(ranked).thresholds.tolist() == [0.9, 0.5] and rates(ranked).precision.tolist() == [1.0, 0.5]
    assert best_f1(ranked) == {"threshold": 0.9, "f1": pytest.approx(2 / 3), "precision": 1.0, "recall": 0.5}


def test_where_nothing_is_right_or_to_be_found():
    nothing = {"threshold": 0.5, "f1": 0.0, "precision": 0.0, "recall": 0.0}
    assert measured([box(0, 0, A)], [])[0]["best_f1"] == nothing
    assert measured([box(0, 0, A)], [box(0, 0, B, score=0.9)])[0]["best_f1"] == nothing
    metrics, details = measured([box(0, 0, A, iscrowd=1)], [box(0, 0, A, score=0.9)])  # to be found: nothing
    assert metrics["AP"] is None and metrics["best_f1"] is None and details is None
    assert "best F1" not in format_metrics(metrics)
    metrics, details = measured([], [box(0, 0, A, score=0.9)])
    assert metrics == {"images": 2, "detections": 1} and details is None
