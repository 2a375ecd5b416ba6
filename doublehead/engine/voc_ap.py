"""Pascal VOC's average precision at IoU 0.5, the area under the whole precision-recall curve.

This is the measure of VOC 2010 and later (every recall level counts), not the 11-point one of
VOC 2007.  Boxes are compared in continuous coordinates (width x2 - x1).
Source: Everingham et al., "The Pascal Visual Object Classes Challenge: A Retrospective", IJCV 2015.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

IOU_THRESHOLD = 0.5


def voc_ap50(ground_truth: dict[str, Any], detections: list[dict[str, Any]]) -> dict[str, float | None]:
    """AP at IoU 0.5 of each category.

    Args:
        ground_truth: a COCO dictionary (`categories`, `annotations` with `bbox` xywh in pixels);
            annotations with `iscrowd` or `ignore` are VOC's difficult ones, which count neither
            as hits nor as misses.
        detections: COCO results: `image_id, category_id, bbox` xywh, `score`.

    Returns:
        Category name -> AP in [0, 1], or None for a category without ground-truth boxes.
    """
    truths: dict[int, dict[int, list]] = defaultdict(lambda: defaultdict(list))
    for annotation in ground_truth["annotations"]:
        difficult = bool(annotation.get("iscrowd") or annotation.get("ignore"))
        truths[annotation["category_id"]][annotation["image_id"]].append((annotation["bbox"], difficult))
    by_category = defaultdict(list)
    for detection in detections:
        by_category[detection["category_id"]].append(detection)
    return {
        category["name"]: _category_ap(truths[category["id"]], by_category[category["id"]])
        for category in ground_truth["categories"]
    }


def _category_ap(truths: dict[int, list], detections: list[dict[str, Any]]) -> float | None:
    wanted = sum(not difficult for boxes in truths.values() for _, difficult in boxes)
    if wanted == 0:
        return None
    used: set[tuple[int, int]] = set()
    hits = []  # 1: true positive, 0: false positive, by falling score; matches with difficult ones are left out
    for detection in sorted(detections, key=lambda d: -d["score"]):
        image = detection["image_id"]
        index, iou = _best_match(detection["bbox"], truths.get(image, []))
        if iou < IOU_THRESHOLD:
            hits.append(0)
        elif not truths[image][index][1]:
            hits.append(0 if (image, index) in used else 1)
            used.add((image, index))
    return _area_under_curve(np.array(hits, dtype=float), wanted)


def _best_match(box: list[float], candidates: list) -> tuple[int, float]:
    """The index of the candidate that overlaps `box` most, and that IoU."""
    best, best_iou = -1, 0.0
    x, y, w, h = box
    for index, ((cx, cy, cw, ch), _) in enumerate(candidates):
        inner = max(0.0, min(x + w, cx + cw) - max(x, cx)) * max(0.0, min(y + h, cy + ch) - max(y, cy))
        iou = inner / max(w * h + cw * ch - inner, 1e-12)
        if iou > best_iou:
            best, best_iou = index, iou
    return best, best_iou


def _area_under_curve(hits: np.ndarray, wanted: int) -> float:
    """Area under precision over recall, precision made non-increasing from the right."""
    right = np.cumsum(hits)
    recall = np.concatenate([[0.0], right / wanted])
    precision = right / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall) * envelope))
