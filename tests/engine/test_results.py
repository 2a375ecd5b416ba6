"""What an evaluation leaves to look at: the detections that the best F1 would show."""

import pytest
import torch
from PIL import ImageDraw
from torch import nn

from doublehead.engine import pictures
from doublehead.engine.evaluator import evaluate_in_detail
from doublehead.engine.results import draw_detections
from tests.support.engine_standin import MemoryDataset


class Finds(nn.Module):
    """Finds the same boxes in every image."""

    def __init__(self, *scores):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        boxes = torch.tensor([[5.0, 5, 25, 25], [30, 30, 50, 50], [40, 0, 60, 20]])[: len(scores)]
        self.output = {
            "boxes": boxes,
            "labels": torch.ones(len(scores), dtype=torch.int64),
            "scores": torch.tensor(scores),
        }

    def forward(self, images):
        return [dict(self.output) for _ in images]


@pytest.fixture
def written(monkeypatch):
    """The texts that are drawn."""
    texts = []
    real = ImageDraw.ImageDraw.text

    def text(draw, place, content, **more):
        texts.append(content)
        real(draw, place, content, **more)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return texts


def drawn(path, written, truths, *scores):
    model = Finds(*scores)
    data = MemoryDataset([torch.zeros(3, 60, 60, dtype=torch.uint8)] * 2, truths)
    metrics, _, details = evaluate_in_detail(model, data)
    draw_detections(path, model, data, torch.device("cpu"), details)
    return metrics, written[1], [text for text in written[2:] if text.startswith("a ")]


TRUTHS = [{"image_id": image, "bbox": [x, x, 20.0, 20.0], "category_id": 2} for image in (7, 17) for x in (5.0, 30.0)]


def test_detections_from_the_best_score_on_are_drawn_and_the_sheet_says_so(tmp_path, written):
    metrics, header, names = drawn(tmp_path / "x.png", written, TRUTHS, 0.9, 0.3456, 0.3)
    assert metrics["best_f1"] == {"threshold": pytest.approx(0.3456), "f1": 1.0, "precision": 1.0, "recall": 1.0}
    assert header == "detections, score ≥ 0.345 (best F1)"
    assert names == ["a 0.35", "a 0.90"] * 2 and pictures.Image.open(tmp_path / "x.png").width > 700


@pytest.mark.parametrize("truths", [[], [TRUTHS[0] | {"bbox": [0.0, 50.0, 5.0, 5.0]}]])
def test_where_no_score_is_best_it_is_a_half(tmp_path, written, truths):
    metrics, header, names = drawn(tmp_path / "x.png", written, truths, 0.9, 0.5, 0.3)
    assert header == "detections, score ≥ 0.5" and names == ["a 0.50", "a 0.90"] * 2
    assert metrics.get("best_f1", {"threshold": 0.5})["threshold"] == 0.5
