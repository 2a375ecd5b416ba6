"""What the tests of the detections share: inputs with crowded boxes, and the rule spelled out one box at a time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from doublehead.ops.boxes import box_iou
from doublehead.ops.detections import reference

OPTIONS: dict[str, Any] = {
    "fusion": "complementary",
    "score_threshold": 0.05,
    "nms_iou": 0.5,
    "max_detections": 20,
    "min_size": 1e-2,
    "least_side": 0.0,
    "box_weights": (10.0, 10.0, 5.0, 5.0),
}


def tensors(batch=2, rois=20, classes=6, seed=0, heads=2, scale=2.0, crowd=4):
    """logits, deltas, proposals, valid, sizes; `crowd` objects an image, around which the proposals lie."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    which = torch.randint(max(crowd, 1), (batch, rois), generator=generator)
    centres = (torch.rand(batch, max(crowd, 1), 2, generator=generator) * 80).gather(
        1, which[..., None].expand(-1, -1, 2)
    )
    corners = centres + normal(batch, rois, 2) * 3
    sides = (25 + normal(batch, rois, 2) * 4).clamp(min=2)
    return (
        [normal(batch, rois, classes) * scale for _ in range(heads)],
        normal(batch, rois, classes, 4) * 0.5,
        torch.cat((corners - sides / 2, corners + sides / 2), -1),
        torch.rand(batch, rois, generator=generator) > 0.1,
        torch.tensor([[70.0, 90.0], [90.0, 64.0], [33.0, 35.0]])[torch.arange(batch) % 3],
    )


def candidate_scores(logits, options, valid) -> Tensor:
    return reference.class_scores(logits, options["fusion"])[..., 1:][valid].flatten()


def clear(inputs, options) -> bool:
    """Whether no two scores above the threshold, nor a score and it, are so close that rounding may turn them round.

    Equal scores are wanted: they come of equal logits, and are equal in every implementation.
    """
    logits, _, _, valid, _ = inputs
    threshold = options["score_threshold"]
    for image in range(len(valid)):
        scores = candidate_scores([item[image] for item in logits], options, valid[image]).double()
        scores = torch.cat((scores[scores > threshold - 1e-6], torch.tensor([threshold]).double()))
        steps = scores.sort().values.diff()
        if ((steps > 0) & (steps < 1e-6)).any():
            return False
    return True


def naive(inputs, options, image) -> list[tuple[float, int, list[float]]]:
    """(score, label, box) of one image, best first: every rule of the operator in plain Python."""
    logits, deltas, proposals, valid, sizes = inputs
    scores = reference.class_scores(logits, options["fusion"])[image]
    found = []
    for roi in range(scores.shape[0]):
        for label in range(1, scores.shape[1]):
            if valid[image, roi] and scores[roi, label] > options["score_threshold"]:
                box = naive_box(deltas[image, roi, label], proposals[image, roi], sizes[image], options)
                if box is not None:
                    found.append((scores[roi, label].item(), label, box))
    found.sort(key=lambda item: -item[0])  # stable: ties by RoI, then by class
    kept = []
    for score, label, box in found:
        others = [other for _, its_label, other in kept if its_label == label]
        if not others or not (box_iou(torch.tensor([box]), torch.tensor(others)) > options["nms_iou"]).any():
            kept.append((score, label, box))
    return kept[: options["max_detections"]]


def naive_box(delta, proposal, size, options) -> list[float] | None:
    """The decoded and clipped box, or None where it is not finite or too small."""
    ends = []
    for axis in range(2):
        low, high = proposal[axis].double(), proposal[2 + axis].double()
        shift, log_ratio = (delta[i].double() / options["box_weights"][i] for i in (axis, 2 + axis))
        centre = (low + high) / 2 + shift * (high - low)
        half = torch.exp(log_ratio.clamp(max=math.log(1000 / 16))) * (high - low) / 2
        pair = torch.stack((centre - half, centre + half)).float()
        if not pair.isfinite().all():
            return None
        least, most = options["least_side"], size[1 - axis]
        ends.append(torch.stack((pair[0].clamp(0, most - least), pair[1].clamp(least, most))))
    if any(high - low < options["min_size"] for low, high in ends):
        return None
    return [ends[0][0].item(), ends[1][0].item(), ends[0][1].item(), ends[1][1].item()]
