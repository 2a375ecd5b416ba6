"""What `headline.py` measures: for each row the two sides, the check that must pass first, and the least bytes."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import heads
import torch
import torchvision
from inputs import DEVICE, eighty_classes, rpn_boxes
from torch import Tensor

from doublehead.ops import MultiScaleRoIAlign, batched_nms, detections, multiscale_roi_align, nms, nms_padded

Call = Callable[[], Any]


@dataclasses.dataclass
class Case:
    """A row's two sides on the same inputs."""

    ours: Call
    peer: Call
    check: Callable[[Any, Any], None]
    """check(ours, peer) raises where the results differ."""
    alone: Call | None = None
    """Ours without waiting for the device, for the device's own time."""
    graphs: bool = False
    """Whether to try both sides as CUDA graphs."""
    way: str = ""
    """How the sides run, where that is not "both eager" or "both as graphs"."""
    bytes_moved: int | None = None


# ---------------------------------------------------------------------------------------------
# Operators


def roi_align(small: bool, direction: str, layout: str, dtype: torch.dtype, boxes: int = 512, images: int = 1) -> Case:
    from pyramid import SCALES, Problem, backward, check, forward

    problem = Problem(not small, layout, 7, boxes, dtype, 2 if small and images > 1 else images)
    ours = problem.module(MultiScaleRoIAlign)
    peer = problem.module(torchvision.ops.MultiScaleRoIAlign)
    if direction == "backward":
        ours, peer = backward(ours, problem), backward(peer, problem)
        return Case(ours, peer, check, alone=ours, bytes_moved=problem.backward_bytes())
    alone = forward(lambda: multiscale_roi_align(problem.features, problem.rois, 7, spatial_scales=SCALES)[0])
    return Case(forward(ours), forward(peer), check, alone=alone, bytes_moved=problem.forward_bytes())


def same_boxes(ours: Tensor, peer: Tensor) -> None:
    """All but one in a thousand kept by both: next to the threshold torchvision rounds in another way."""
    both = torch.isin(ours, peer).sum().item()
    assert 2 * max(len(ours), len(peer)) - 2 * both <= 0.002 * len(peer), (
        f"{len(ours)} and {len(peer)} kept, {both} by both"
    )


def plain_nms(small: bool, count: int, threshold: float) -> Case:
    boxes, scores = rpn_boxes(200 if small else count)
    most, groups = len(boxes), scores.new_zeros((1, len(boxes)), dtype=torch.int64)
    return Case(
        lambda: nms(boxes, scores, threshold),
        lambda: torchvision.ops.nms(boxes, scores, threshold),
        same_boxes,
        alone=lambda: nms_padded(boxes[None], scores[None], groups, threshold, most),
    )


def grouped_nms(small: bool) -> Case:
    boxes, scores, classes = eighty_classes(10 if small else 1000)
    most = len(boxes)
    return Case(
        lambda: batched_nms(boxes, scores, classes, 0.5),
        lambda: torchvision.ops.batched_nms(boxes, scores, classes, 0.5),
        same_boxes,
        alone=lambda: nms_padded(boxes[None], scores[None], classes[None], 0.5, most),
    )


def post_processing(small: bool) -> Case:
    from post_processing import OPTIONS, agreement, batched, head_outputs, image_by_image

    inputs = head_outputs(1, 100 if small else 1000, 21 if small else 81)

    def ours() -> tuple[Tensor, ...]:
        return detections(*inputs, **OPTIONS)

    def check(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
        sides = []
        for boxes, _, labels, count in (found, expected):
            kept = int(count[0])
            sides.append({"boxes": boxes[0, :kept], "labels": labels[0, :kept]})
        assert len(sides[1]["boxes"]) > 10
        share = agreement(*sides)
        assert share > 0.98, f"only {share:.0%} of the detections agree"

    return Case(ours, lambda: image_by_image(inputs, batched), check, alone=ours)


# ---------------------------------------------------------------------------------------------
# Heads


def rois(small: bool) -> int:
    return 2 if small else 1000


def non_local(small: bool, training: bool) -> Case:
    x = heads.maps(rois(small), heads.WIDE, seed=1)
    found = heads.blocks("dot_product, 4 groups")
    if training:
        x.requires_grad_()
        grad = heads.maps(rois(small), heads.WIDE, seed=2)
        ours, peer = (heads.block_step(found[name], x, grad) for name in ("doublehead", "reference"))
    else:
        ours, peer = (heads.block_inference(found[name], x) for name in ("doublehead", "reference"))
    return Case(ours, peer, heads.near, alone=ours, graphs=not training)


def conv_head(small: bool, training: bool = False, dtype: torch.dtype = heads.DTYPE) -> Case:
    x = heads.maps(rois(small), 256, dtype)
    plain, fused = (tower.train(training) for tower in heads.towers())
    if training:
        x.requires_grad_()
        ours = heads.training_step(fused, x)
        return Case(ours, heads.training_step(plain, x), heads.step_near, alone=ours)
    ours = heads.inference(fused, x)
    return Case(ours, heads.inference(plain, x), heads.close, alone=ours, graphs=True)


# ---------------------------------------------------------------------------------------------
# Detectors

AGREE = {torch.float32: 0.9, torch.bfloat16: 0.3}
"""Share of a graph's detections that eager finds too: rounding alone changes some in a random network."""


@functools.cache
def detectors(small: bool) -> dict[str, Any]:
    """torchvision's Faster R-CNN and two of ours with its backbone, RPN and, for the kind fc, heads."""
    import detectors as make

    side, proposals = (128, 30) if small else (800, 1000)
    images = make.pictures(1 if small else 16, side)
    torchvisions = make.torchvisions(images[:1], side, proposals)
    fc = make.fc_kind(torchvisions, side, proposals)
    shared = {name: value for name, value in fc.state_dict().items() if name.startswith(make.SHARED)}
    config = make.adapted(make.RECIPES[make.RECIPE["Double-Head-Ext"]].model, side, proposals)
    ext = make.double_head(config, shared, images[:1])
    return {"images": images, "torchvision": torchvisions, "fc": fc, "ext": ext}


def detector(small: bool, batch: int, dtype: torch.dtype, kind: str = "ext") -> Case:
    """One of ours as one graph against torchvision's `fasterrcnn_resnet50_fpn`, which cannot be captured."""
    from post_processing import agreement

    found = detectors(small)
    images = found["images"][:batch]
    graph = copy.deepcopy(found[kind])
    if DEVICE == "cuda":
        with torch.inference_mode():
            height, width = graph.transform(images)[0].pixels.shape[-2:]
        graph.compile_graph(len(images), height, width, dtype)

    def call(model: torch.nn.Module) -> Call:
        def run() -> list[dict[str, Tensor]]:
            with torch.inference_mode(), torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
                return model(images)

        return run

    eager = call(found[kind])()

    def check(ours: list[dict[str, Tensor]], peer: list[dict[str, Tensor]]) -> None:
        assert all(len(image["boxes"]) for side in (ours, peer) for image in side[:1]), "no detections"
        shares = [agreement(image, expected) for image, expected in zip(ours, eager, strict=True)]
        share = sum(shares) / len(shares)
        assert share > AGREE[dtype], f"only {share:.0%} of the eager detections agree"

    return Case(call(graph), call(found["torchvision"]), check, way="ours one graph, peer eager")


F32, BF16 = torch.float32, torch.bfloat16
HALF = heads.DTYPE
"""The dtype of whole networks: bfloat16; on a CPU float32, as many compute bfloat16 very slowly."""
ROWS: dict[str, Callable[[bool], Case]] = {
    "roi_forward": lambda s: roi_align(s, "forward", "channels_last", F32),
    "roi_forward_bf16": lambda s: roi_align(s, "forward", "channels_last", BF16),
    "roi_forward_nchw": lambda s: roi_align(s, "forward", "nchw", F32),
    "roi_backward": lambda s: roi_align(s, "backward", "channels_last", F32),
    "roi_backward_bf16": lambda s: roi_align(s, "backward", "channels_last", BF16),
    "roi_backward_1000": lambda s: roi_align(s, "backward", "channels_last", F32, boxes=1000),
    "roi_backward_16": lambda s: roi_align(s, "backward", "channels_last", F32, images=16),
    "nms_4000": lambda s: plain_nms(s, 4_000, 0.5),
    "nms_12000": lambda s: plain_nms(s, 12_000, 0.5),
    "nms_200000": lambda s: plain_nms(s, 200_000, 0.7),
    "nms_80x1000": grouped_nms,
    "detections": post_processing,
    "non_local": lambda s: non_local(s, training=False),
    "non_local_training": lambda s: non_local(s, training=True),
    "conv_head": conv_head,
    "conv_head_training": lambda s: conv_head(s, training=True),
    "conv_head_fp32": lambda s: conv_head(s, dtype=F32),
    "ext_1": lambda s: detector(s, 1, HALF),
    "ext_16": lambda s: detector(s, 16, HALF),
    "ext_1_fp32": lambda s: detector(s, 1, F32),
    "fc_1": lambda s: detector(s, 1, HALF, "fc"),
}
"""Row -> its case; the argument says whether a tiny one is wanted. `headline.PLAN` has their words and targets."""
