"""What an evaluation leaves to look at: its charts, and detections beside the ground truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from doublehead.engine import charts, pictures
from doublehead.engine.coco_metrics import Details
from doublehead.engine.evaluator import predict_images
from doublehead.engine.matching import FALLBACK_THRESHOLD

DETECTIONS_FILE = "detections.png"
RESULT_FILES = (*charts.CHARTS, DETECTIONS_FILE)
PICTURES = 8  # images in detections.png


def draw_results(
    folder: Path, title: str, model: nn.Module, dataset: Any, device: torch.device, details: Details | None
) -> list[str]:
    """Draw `detections.png`, and the charts of an evaluation if there was something to find.

    Args:
        folder: an existing folder; what it has of these files is replaced.
        title: stands above the charts.
        details: of the evaluation of `model` on `dataset`.

    Returns:
        The names of the files.
    """
    drawn = charts.draw_charts(details, folder, title) if details is not None else []
    draw_detections(folder / DETECTIONS_FILE, model, dataset, device, details)
    return [*drawn, DETECTIONS_FILE]


def draw_detections(path: Path, model: nn.Module, dataset: Any, device: torch.device, details: Details | None) -> None:
    """Some images with ground truth and with what the model finds, from the score of the best F1 on."""
    count = min(PICTURES, len(dataset))
    chosen = [i * len(dataset) // count for i in range(count)]
    images, targets = zip(*(dataset[i] for i in chosen), strict=True)
    outputs = predict_images(model, images, device)
    if details is not None and details.best_f1["f1"] > 0:
        shown = {"threshold": details.best_f1["threshold"], "why": "best F1"}
    else:
        shown = {"threshold": FALLBACK_THRESHOLD}
    pictures.save_picture(path, pictures.detection_grid(images, targets, outputs, dataset.classes, **shown))
