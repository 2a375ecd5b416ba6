"""COCO's numbers, by pycocotools, VOC's, and what the charts of an evaluation show, from ground truth and results."""

from __future__ import annotations

import contextlib
import io
from typing import Any, NamedTuple

import numpy as np

from doublehead.engine.matching import Ranking, best_f1, confusion_matrix, ranking
from doublehead.engine.metrics_text import COCO_NUMBERS
from doublehead.engine.voc_ap import voc_ap50

CocoResults = list[dict[str, Any]]


class Details(NamedTuple):
    """What the charts of an evaluation show beyond its metrics."""

    classes: list[str]
    precision: np.ndarray
    """pycocotools' own, float64 `[10, 101, K]`: IoU 0.50 .. 0.95, recall 0 .. 1, class; -1 where it has no box."""
    ranking: Ranking
    best_f1: dict[str, float]
    """As in the metrics."""
    confusion: np.ndarray
    """int64 `[K + 1, K + 1]` at the threshold of the best F1; see `confusion_matrix`."""


def compute_metrics(ground_truth: dict[str, Any], results: CocoResults, dataset: Any, voc: bool) -> dict[str, Any]:
    """The metrics of `evaluate` from ground truth and results in COCO's format."""
    return detailed_metrics(ground_truth, results, dataset, voc)[0]


def detailed_metrics(
    ground_truth: dict[str, Any], results: CocoResults, dataset: Any, voc: bool
) -> tuple[dict[str, Any], Details | None]:
    """`compute_metrics`, and what its charts show; None without a box to find."""
    metrics: dict[str, Any] = {"images": len(dataset), "detections": len(results)}
    if not ground_truth["annotations"]:
        return metrics, None
    if voc:  # before pycocotools, which overwrites the annotations' `ignore`
        by_class = voc_ap50(ground_truth, results)
        known = [ap for ap in by_class.values() if ap is not None]
        metrics["voc"] = {"mAP50": sum(known) / len(known) if known else None, "classes": by_class}
    truth, detections = _renumbered(ground_truth, results, dataset)
    evaluation = _coco_evaluation(truth, detections, dataset)
    numbers = {name: _known(value) for name, value in zip(COCO_NUMBERS, evaluation.stats, strict=True)}
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # IoU, recall, class; all areas, most detections
    classes = {
        name: {"AP": _mean(precision[:, :, k]), "AP50": _mean(precision[0, :, k])}
        for k, name in enumerate(dataset.classes)
    }
    ranked = ranking(evaluation)
    best = best_f1(ranked)
    details = None
    if best is not None:
        confusion = confusion_matrix(truth["annotations"], detections, len(dataset.classes), best["threshold"])
        details = Details(list(dataset.classes), precision, ranked, best, confusion)
    return numbers | {"classes": classes, "best_f1": best} | metrics, details


def _coco_evaluation(truth: dict[str, Any], detections: CocoResults, dataset: Any) -> Any:
    """A `COCOeval` that is done, of numbered images and categories."""
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        evaluation = COCOeval(_coco(truth), _coco(_as_annotations(truth, detections)), "bbox")
        evaluation.params.imgIds = list(range(1, len(dataset.image_ids) + 1))
        evaluation.params.catIds = list(range(1, len(dataset.category_ids) + 1))
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def _renumbered(ground_truth: dict[str, Any], results: CocoResults, dataset: Any) -> tuple[dict[str, Any], CocoResults]:
    """Copies in which images, categories and annotations are numbered from 1, in the data set's order.

    pycocotools takes a match with the annotation of id 0 for no match, keeps only the later of two annotations with the
    same id, and ranks detections of equal score by image id: metrics must not depend on a file's numbering.
    """
    images = {image: number for number, image in enumerate(dataset.image_ids, start=1)}
    categories = {category: number for number, category in enumerate(dataset.category_ids, start=1)}

    def moved(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        known = [e for e in entries if e["image_id"] in images and e["category_id"] in categories]
        return [
            e | {"id": number, "image_id": images[e["image_id"]], "category_id": categories[e["category_id"]]}
            for number, e in enumerate(known, start=1)
        ]

    truth = {
        "images": [{"id": number} for number in images.values()],
        "categories": [{"id": number} for number in categories.values()],
        "annotations": moved(ground_truth["annotations"]),
    }
    return truth, moved(results)


def _coco(content: dict[str, Any]) -> Any:
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = content
    coco.createIndex()
    return coco


def _as_annotations(ground_truth: dict[str, Any], results: CocoResults) -> dict[str, Any]:
    """Numbered results as a COCO data set; `COCO.loadRes` does the same but fails when there are none."""
    annotations = [result | {"area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0} for result in results]
    return {"images": ground_truth["images"], "categories": ground_truth["categories"], "annotations": annotations}


def _known(value: float) -> float | None:
    return None if value < 0 else float(value)  # pycocotools writes -1 where there is nothing to measure


def _mean(values: Any) -> float | None:
    values = values[values > -1]
    return float(values.mean()) if values.size else None
