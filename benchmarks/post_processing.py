"""From logits to detections: inputs as a detector's heads give them, and torchvision's post-processing."""

from __future__ import annotations

import torch
import torchvision
from inputs import DEVICE, rpn_boxes
from torch import Tensor

from doublehead.ops import box_iou
from doublehead.ops.boxes import clip_boxes, decode_boxes

OPTIONS = {
    "fusion": "complementary",
    "score_threshold": 0.05,
    "nms_iou": 0.5,
    "max_detections": 100,
    "min_size": 1e-2,
    "least_side": 0.0,
    "box_weights": (10.0, 10.0, 5.0, 5.0),
}


def head_outputs(batch: int, rois: int, classes: int) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """Logits of two heads, deltas, proposals, valid, sizes: 40 objects an image, background between them.

    The better a proposal fits its object, the surer are both heads of the object's class, and the less the box moves.
    """
    generator = torch.Generator().manual_seed(4)  # of its best scores none are so close that rounding may swap them
    proposals = torch.stack([rpn_boxes(rois, seed=image)[0].cpu() for image in range(batch)])
    best, which = box_iou(proposals, proposals[:, :40]).max(-1)
    labels = torch.randint(1, classes, (batch, 40), generator=generator).gather(1, which)
    labels = torch.where(best > 0.3, labels, 0)
    logits = []
    for _ in range(2):
        sure = 3 + 4 * best + torch.randn(best.shape, generator=generator)
        noise = torch.randn(batch, rois, classes, generator=generator)
        logits.append(noise.scatter_add(2, labels[..., None], sure[..., None]))
    deltas = torch.randn(batch, rois, classes, 4, generator=generator) * (1.5 - best)[..., None, None]
    sizes = torch.tensor([[800.0, 1344.0]]).expand(batch, 2)
    valid = torch.ones(batch, rois, dtype=torch.bool)
    to = [item.to(DEVICE).contiguous() for item in (*logits, deltas, proposals, valid, sizes)]
    return to[:2], *to[2:]


def image_by_image(inputs, suppress) -> tuple[Tensor, ...]:
    """What torchvision's detection heads do after the heads, for each image apart; `suppress` is their NMS."""
    logits, deltas, proposals, _, sizes = inputs
    fc, conv = (item.softmax(-1) for item in logits)
    scores = (fc + conv * (1 - fc))[..., 1:]
    most = OPTIONS["max_detections"]
    results = []
    for image in range(len(scores)):
        boxes = decode_boxes(deltas[image, :, 1:], proposals[image, :, None], OPTIONS["box_weights"]).flatten(0, 1)
        boxes = clip_boxes(boxes, sizes[image])
        labels = torch.arange(1, scores.shape[2] + 1, device=scores.device).repeat(scores.shape[1])
        flat = scores[image].flatten()
        keep = torch.where(flat > OPTIONS["score_threshold"])[0]
        boxes, flat, labels = boxes[keep], flat[keep], labels[keep]
        keep = torchvision.ops.remove_small_boxes(boxes, OPTIONS["min_size"])
        boxes, flat, labels = boxes[keep], flat[keep], labels[keep]
        keep = suppress(boxes, flat, labels)[:most]
        pad = most - len(keep)
        results.append(
            [
                torch.nn.functional.pad(item[keep], (0, 0) * (item.dim() - 1) + (0, pad))
                for item in (boxes, flat, labels)
            ]
            + [torch.tensor(len(keep), device=scores.device)]
        )
    return tuple(torch.stack(column) for column in zip(*results, strict=True))


def batched(boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    return torchvision.ops.batched_nms(boxes, scores, labels, OPTIONS["nms_iou"])


def class_by_class(boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    kept = []
    for label in labels.unique():
        rows = torch.where(labels == label)[0]
        kept.append(rows[torchvision.ops.nms(boxes[rows], scores[rows], OPTIONS["nms_iou"])])
    kept = torch.cat(kept) if kept else labels
    return kept[scores[kept].argsort(descending=True)]


def check(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for name, a, e in zip(("boxes", "scores", "labels", "count"), actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-3, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def agreement(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The share of the expected boxes that have a counterpart: the same label, an IoU above 0.9."""
    same = (box_iou(expected["boxes"], found["boxes"]) > 0.9) & (expected["labels"][:, None] == found["labels"])
    return same.any(1).float().mean().item()
