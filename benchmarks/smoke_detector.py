"""What `smoke.py` runs of a whole detector: a step of inference, one of training, and the replay of a CUDA graph."""

from __future__ import annotations

import copy

import torch
from smoke_cases import FLOAT32, case, differing, moved
from torch import Tensor, nn

from doublehead.config import (
    BackboneConfig,
    DetectionConfig,
    HeadConfig,
    ImageConfig,
    ModelConfig,
    RoIConfig,
    RPNConfig,
)
from doublehead.exporting.program import exact_float32
from doublehead.models import ImageBatch, build_detector
from doublehead.models.structures import Detections, pad_targets
from doublehead.ops import box_iou

STEP = "pyramid_roi_align nms_padded"
INFERENCE = f"{STEP} detections_by_class"
"""What `_C_cuda` serves of it."""
UNLIKE = 0.05
"""Share of detections that may differ: rounding can swap two candidates with nearly the same score."""


def tiny_ext() -> nn.Module:
    """The smallest double_head_ext that the kernels serve, with batch norms fitted to their inputs."""
    config = ModelConfig(
        backbone=BackboneConfig("resnet18", "batch_norm", weights=None, frozen_stages=0, fpn_channels=32),
        # So many samples that all anchors and RoIs are drawn: nothing is left to chance.
        rpn=RPNConfig((8, 16, 32, 64, 128), samples=2**16, positive_fraction=1.0, pre_nms_train=60, pre_nms_test=60,
                      post_nms_train=40, post_nms_test=30),
        roi=RoIConfig(samples=256, positive_fraction=1.0),
        head=HeadConfig("double_head_ext", fc_dim=64, conv_dim=128, conv_blocks=3),
        detection=DetectionConfig(max_detections=50),
        image=ImageConfig(min_size=(64,), max_size=96),
    )  # fmt: skip
    torch.manual_seed(0)
    model = build_detector(config, num_classes=4)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        model.detector.train()(batch(), targets())
    for head in model.detector.heads.values():
        nn.init.normal_(head.classifier.weight, std=0.5)
    return model.eval()


def batch() -> ImageBatch:
    pixels = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    return ImageBatch(pixels, torch.tensor([[64.0, 90.0], [50.0, 96.0]]))


def targets():
    boxes = [torch.tensor([[5.0, 5, 30, 40]]), torch.tensor([[10.0, 8, 60, 45], [50, 20, 80, 44]])]
    return pad_targets(boxes, [torch.tensor([1]), torch.tensor([2, 3])])


def on(device: str, value, dtype: torch.dtype | None = None):
    """A tuple with names, such as `ImageBatch`, on that device."""
    return type(value)(*(moved(item, device, dtype) for item in value))


def unlike(found: Detections, expected: Detections) -> float:
    """Share of both sides' detections that have no match on the other side in class, box and score."""
    missing = total = 0
    for i in range(len(expected.count)):
        one, other = (image_of(each, i) for each in (found, expected))
        for (boxes, scores, labels), (their_boxes, their_scores, their_labels) in ((one, other), (other, one)):
            like = (box_iou(boxes, their_boxes) > 0.95) & (labels[:, None] == their_labels)
            like &= (scores[:, None] - their_scores).abs() < 0.01
            missing += int((~like.any(1)).sum())
            total += len(boxes)
    return missing / total if total else float("inf")


def image_of(found: Detections, index: int) -> tuple[Tensor, Tensor, Tensor]:
    count = int(found.count[index])
    boxes, scores, labels = (value[index, :count].cpu() for value in found[:3])
    assert boxes.isfinite().all() and scores.isfinite().all(), "not finite"
    return boxes.double(), scores.double(), labels


@case("detector, inference", FLOAT32, INFERENCE, "fused_conv non_local", apart=True, cuda=True)
def inference(device, dtype):
    model = tiny_ext()
    with torch.no_grad(), exact_float32():
        expected = copy.deepcopy(model).double().detector(on("cpu", batch(), torch.float64))
        found = model.to(device).detector(on(device, batch()))
    yield "unlike detections", unlike(found, expected), UNLIKE
    if device == "cuda":  # exact float32 leaves convolutions to the library: this launches our kernels
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            found = model.detector(on(device, batch()))
        yield "images without detections in bfloat16", float((found.count == 0).sum()), 0
        for index in range(len(found.count)):
            image_of(found, index)


@case("detector, training", FLOAT32, f"{STEP} pyramid_roi_align_backward", "batch_norm", apart=True, cuda=True)
def training(device, dtype):
    model = tiny_ext().train()
    results = []
    with exact_float32():
        for where, wide in ((device, dtype), ("cpu", torch.float64)):
            there = copy.deepcopy(model).to(where, wide).detector
            losses = there(on(where, batch(), wide), on(where, targets(), wide))
            sum(losses.values()).backward()
            results.append((losses, {name: p.grad for name, p in there.named_parameters()}))
    (losses, grads), (exact_losses, exact_grads) = results
    for name, exact in exact_losses.items():
        yield name, abs(losses[name].item() - exact.item()), 1e-3 * max(abs(exact.item()), 1e-2)
    missing = [name for name, grad in exact_grads.items() if (grad is None) != (grads[name] is None)]
    assert not missing, f"gradients of {missing}"
    known = [name for name, exact in exact_grads.items() if exact is not None]
    errors = [(grads[name].double().cpu() - exact_grads[name]).norm() for name in known]
    sizes = [exact_grads[name].norm() for name in known]
    yield "gradients (relative)", (torch.stack(errors).norm() / torch.stack(sizes).norm()).item(), 2e-2


@case("detector, graph", FLOAT32, INFERENCE, "fused_conv non_local", apart=True, cuda=True)
def graph(device, dtype):
    model = tiny_ext().to(device)
    images = on(device, batch())
    with torch.no_grad(), exact_float32():
        expected = model.detector(images)
        model.compile_graph(2, 64, 96)
        found, again = (model._graphs(model.detector, images) for _ in range(2))
    yield "unlike eager", unlike(found, expected), UNLIKE
    yield "replays differ", differing_replays(found, again), 0
    with torch.no_grad():
        model.compile_graph(2, 64, 96, dtype=torch.bfloat16)
        found, again = (model._graphs(model.detector, images) for _ in range(2))
    yield "replays in bfloat16 differ", differing_replays(found, again), 0
    yield "images without detections in bfloat16", float((found.count == 0).sum()), 0


def differing_replays(one: Detections, other: Detections) -> int:
    return sum(differing(a, b) for a, b in zip(one[:4], other[:4], strict=True))
