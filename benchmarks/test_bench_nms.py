"""NMS against torchvision, side by side on the boxes of a region proposal network."""

from __future__ import annotations

import pytest
import torch
from inputs import DEVICE, eighty_classes, rpn_boxes

from doublehead.ops import batched_nms, nms, nms_padded
from doublehead.ops.nms import reference

torchvision = pytest.importorskip("torchvision")


@pytest.mark.parametrize("threshold", [0.7, 0.5])
@pytest.mark.parametrize("count", [1_000, 4_000, 12_000])
def test_nms(compare, count, threshold):
    boxes, scores = rpn_boxes(count)
    kept = nms(boxes, scores, threshold)
    compare(
        op="nms",
        case=f"nms, {count} boxes, threshold {threshold}",
        details={"boxes": count, "iou_threshold": threshold, "kept": len(kept)},
        providers={
            "torchvision": lambda: torchvision.ops.nms(boxes, scores, threshold),
            "reference": (
                (lambda: reference.nms(boxes, scores, None, threshold))
                if count == 1_000
                else "only timed at 1000 boxes"
            ),
            "doublehead": lambda: nms(boxes, scores, threshold),
        },
    )


def test_nms_200_000(compare):
    boxes, scores = rpn_boxes(200_000 if compare.measures else 20_000)  # torchvision takes its time
    compare(
        op="nms",
        case="nms, 200000 boxes, threshold 0.7",
        details={"boxes": 200_000, "iou_threshold": 0.7, "kept": len(nms(boxes, scores, 0.7))},
        providers={
            "torchvision": lambda: torchvision.ops.nms(boxes, scores, 0.7),
            "doublehead": lambda: nms(boxes, scores, 0.7),
        },
        min_rounds=1,
    )


@pytest.mark.parametrize("threshold", [0.7, 0.5])
def test_batched_nms(compare, threshold):
    boxes, scores, classes = eighty_classes()
    kept = batched_nms(boxes, scores, classes, threshold)
    compare(
        op="nms",
        case=f"batched_nms, 80 classes x 1000 boxes, threshold {threshold}",
        details={"boxes": 80_000, "classes": 80, "iou_threshold": threshold, "kept": len(kept)},
        providers={
            "torchvision": lambda: torchvision.ops.batched_nms(boxes, scores, classes, threshold),
            "doublehead": lambda: batched_nms(boxes, scores, classes, threshold),
        },
    )


def test_hundred_detections(compare):
    # What a detector needs of 80,000 candidates: the best hundred. torchvision has no way to stop early.
    boxes, scores, classes = eighty_classes()
    padded = boxes[None], scores[None], classes[None]
    compare(
        op="nms",
        case="the best 100 of 80 classes x 1000 boxes, threshold 0.5",
        details={"boxes": 80_000, "classes": 80, "iou_threshold": 0.5, "max_output": 100},
        providers={
            "torchvision": lambda: torchvision.ops.batched_nms(boxes, scores, classes, 0.5)[:100],
            "reference": lambda: reference.nms_padded(*padded, 0.5, 100)[0][0],
            "doublehead": lambda: nms_padded(*padded, 0.5, 100)[0][0],
        },
    )


def test_proposals(compare):
    # Two images, five pyramid levels of at most 1000 candidates, the best 1000 proposals of each.
    images = [rpn_boxes(5_000, seed=image) for image in range(2)]
    boxes, scores = (torch.stack(tensors) for tensors in zip(*images, strict=True))
    levels = (torch.arange(5_000, device=DEVICE) // 1_000).expand(2, -1).contiguous()

    def per_image():
        return torch.stack([torchvision.ops.batched_nms(boxes[i], scores[i], levels[i], 0.7)[:1000] for i in range(2)])

    compare(
        op="nms",
        case="proposals: 2 images x 5 levels x 1000 boxes, the best 1000, threshold 0.7",
        details={"images": 2, "boxes": 5_000, "levels": 5, "iou_threshold": 0.7, "max_output": 1_000},
        providers={
            "torchvision": per_image,
            "doublehead": lambda: nms_padded(boxes, scores, levels, 0.7, 1_000)[0],
        },
    )
