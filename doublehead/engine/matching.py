"""Which detections are right at IoU 0.5: the score threshold of the best F1, and which classes are taken for which."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np

IOU = 0.5
FALLBACK_THRESHOLD = 0.5
"""The score from which on detections are shown where no score is better than another."""


class Ranking(NamedTuple):
    """Detections of all images and classes, the highest score first; without those that match an ignored box."""

    scores: np.ndarray
    """float64 `[N]`."""
    hits: np.ndarray
    """bool `[N]`: the detection is right, by COCO's matching within its class at IoU 0.5."""
    wanted: int
    """How many boxes there are to find: those of the ground truth that are not ignored (crowd, difficult)."""


class Rates(NamedTuple):
    """Precision, recall and F1 of the detections that score at least `thresholds`, which fall."""

    thresholds: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray


def ranking(evaluation: Any) -> Ranking:
    """The matches at IoU 0.5 and of all sizes that a `COCOeval` has made in `evaluate`."""
    params = evaluation.params
    at = int(np.argmin(np.abs(np.asarray(params.iouThrs) - IOU)))
    images, areas = len(params.imgIds), len(params.areaRng)
    scores, hits, wanted = [np.zeros(0)], [np.zeros(0, bool)], 0
    for number, image in enumerate(evaluation.evalImgs):  # by class, size, image; the first size is all
        if image is None or number // images % areas:
            continue
        counts = ~np.asarray(image["dtIgnore"][at], bool)
        scores.append(np.asarray(image["dtScores"], float)[counts])
        hits.append((np.asarray(image["dtMatches"][at]) > 0)[counts])
        wanted += int(np.sum(np.asarray(image["gtIgnore"]) == 0))
    joined, right = np.concatenate(scores), np.concatenate(hits)
    order = np.argsort(-joined, kind="stable")
    return Ranking(joined[order], right[order], wanted)


def rates(ranked: Ranking) -> Rates:
    """Precision, recall and F1 for each score as the threshold; detections of equal score come and go together."""
    last = np.flatnonzero(np.append(ranked.scores[1:] != ranked.scores[:-1], True)[: len(ranked.scores)])
    right, shown = np.cumsum(ranked.hits)[last], last + 1
    recall = right / max(1, ranked.wanted)
    return Rates(ranked.scores[last], right / shown, recall, 2 * right / np.maximum(1, shown + ranked.wanted))


def best_f1(ranked: Ranking) -> dict[str, float] | None:
    """`threshold, f1, precision, recall` where F1 is highest, at the highest such score; None: no boxes to find.

    Where no detection is right the threshold is `FALLBACK_THRESHOLD`, and the others are 0.
    """
    if not ranked.wanted:
        return None
    if not ranked.hits.any():
        return {"threshold": FALLBACK_THRESHOLD, "f1": 0.0, "precision": 0.0, "recall": 0.0}
    all_rates = rates(ranked)
    best = int(np.argmax(all_rates.f1))
    names = {"threshold": "thresholds", "f1": "f1", "precision": "precision", "recall": "recall"}
    return {name: float(getattr(all_rates, field)[best]) for name, field in names.items()}


def confusion_matrix(
    truths: list[dict[str, Any]], detections: list[dict[str, Any]], classes: int, threshold: float
) -> np.ndarray:
    """How often a box of one class was detected as another.

    In each image the detections that score at least `threshold` take, the best score first, the box of any class that
    overlaps them most, from IoU 0.5 on, if no other detection has it.  Ignored boxes (crowd, difficult) are not to be
    found; a detection that took no box and lies on an ignored one of its class is left out.

    Args:
        truths: annotations in COCO's format: `image_id`, `category_id` in 1 .. classes, `bbox`, `iscrowd`.
        detections: the same with `score`.

    Returns:
        int64 `[classes + 1, classes + 1]`: row i, column j counts boxes of class i + 1 detected as class j + 1.  The
        last column counts boxes that were missed, the last row detections where there was no free box.
    """
    matrix = np.zeros((classes + 1, classes + 1), np.int64)
    boxes, found = defaultdict(list), defaultdict(list)
    for truth in truths:
        boxes[truth["image_id"]].append(truth)
    for detection in detections:
        if detection["score"] >= threshold:
            found[detection["image_id"]].append(detection)
    for image in boxes.keys() | found.keys():
        _count_image(matrix, boxes[image], sorted(found[image], key=lambda detection: -detection["score"]))
    return matrix


def _count_image(matrix: np.ndarray, truths: list[dict[str, Any]], detections: list[dict[str, Any]]) -> None:
    """Add one image to the matrix; its detections come by falling score."""
    wanted = [truth for truth in truths if not _ignored(truth)]
    ignored = [truth for truth in truths if _ignored(truth)]
    overlaps, on_ignored = _overlaps(detections, wanted), _overlaps(detections, ignored)
    free = np.ones(len(wanted), bool)
    for number, detection in enumerate(detections):
        column = detection["category_id"] - 1
        candidates = np.where(free, overlaps[number], 0.0)
        if candidates.size and candidates.max() >= IOU:
            chosen = int(candidates.argmax())
            free[chosen] = False
            matrix[wanted[chosen]["category_id"] - 1, column] += 1
            continue
        pairs = zip(on_ignored[number], ignored, strict=True)
        if not any(overlap >= IOU and box["category_id"] == detection["category_id"] for overlap, box in pairs):
            matrix[-1, column] += 1
    for truth, missed in zip(wanted, free, strict=True):
        matrix[truth["category_id"] - 1, -1] += int(missed)


def _ignored(truth: dict[str, Any]) -> bool:
    return bool(truth.get("iscrowd"))


def _overlaps(detections: list[dict[str, Any]], boxes: list[dict[str, Any]]) -> np.ndarray:
    """IoU `[detections, boxes]`; with a crowd the share of the detection that lies in it, as COCO counts."""
    from pycocotools import mask

    if not (detections and boxes):
        return np.zeros((len(detections), len(boxes)))
    corners = [np.array([entry["bbox"] for entry in entries], float) for entries in (detections, boxes)]
    return mask.iou(*corners, [int(_ignored(box)) for box in boxes])
