"""Ground truth that an untrained detector finds: its own best detections."""

from __future__ import annotations

from collections.abc import Callable

from doublehead.engine.evaluator import inference


def own_findings(model, dataset, count: int = 12) -> Callable[[], list[dict]]:
    """An `annotations` for `dataset`: the best `count` detections of `model` in each of its images."""
    found: list[dict] = []
    with inference(model):
        for index, image_id in enumerate(dataset.image_ids):
            (output,) = model([dataset.load(index)[0]])
            for (x1, y1, x2, y2), label in zip(
                output["boxes"][:count].tolist(), output["labels"].tolist(), strict=False
            ):
                box = [x1, y1, x2 - x1, y2 - y1]
                found.append({"id": len(found) + 1, "image_id": image_id, "category_id": label, "bbox": box,
                              "area": box[2] * box[3], "iscrowd": 0})  # fmt: skip
    return lambda: [dict(entry) for entry in found]
