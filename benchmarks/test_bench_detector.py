"""Whole detectors side by side on the same pictures, and the part of them that `doublehead.accelerate` replaces.

First a gate: in float64, where rounding decides nothing, the accelerated model and this library's `fc` kind must find
exactly what torchvision's model finds.  Weights are random, but such that there is something to suppress and to detect.
The Double-Head models share the backbone's and the RPN's weights, so that their proposals are the same.

On a CPU whole detectors are timed by test_bench_cpu_detector.py, in more precisions and under more runtimes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import harness
import pytest
import torch
from inputs import DEVICE
from torch import Tensor, nn

pytest.importorskip("torchvision")

from detector_checks import same_in_float64  # noqa: E402
from detectors import GRAPH, RECIPE, as_graphs, models, pictures, torchvisions  # noqa: E402
from post_processing import agreement  # noqa: E402
from stages import shares  # noqa: E402

import doublehead  # noqa: E402
from doublehead.ops import box_iou  # noqa: E402

MODES = ["float32"] if DEVICE == "cpu" else ["float32", "bfloat16"]
AGREE = {"float32": 0.9, "bfloat16": 0.3}
"""Share of detections with a counterpart: rounding alone changes some in a random network, 16 bits many."""


def checker(mode: str) -> Callable[[Any, Any], None]:
    def check(actual: tuple[str, list[dict]], expected: tuple[str, list[dict]]) -> None:
        family, found = actual
        assert sum(len(image["boxes"]) for image in found) > 0, f"{family}: no detections, which measures nothing"
        if family != expected[0]:
            return  # another detector
        shares = [agreement(f, e) for f, e in zip(found, expected[1], strict=True)]
        assert sum(shares) / len(shares) > AGREE[mode]

    return check


# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1] if DEVICE == "cpu" else [1, 16])
@pytest.mark.parametrize("mode", MODES)
def test_detector(compare, mode, batch):
    if DEVICE == "cpu" and compare.measures:
        pytest.skip("timed by test_bench_cpu_detector.py")
    side = 800 if compare.measures else 128
    images = pictures(batch, side)
    found = models(images, side, proposals=1000 if compare.measures else 30)
    same_in_float64(found)
    if DEVICE == "cuda":
        found |= as_graphs(found, images, mode)

    def caller(name: str) -> Callable[[], tuple[str, list[dict]]]:
        kind = name.removesuffix(GRAPH)
        family = kind if kind in RECIPE else "Faster R-CNN"

        def call():
            precision = torch.autocast("cuda", torch.bfloat16) if mode == "bfloat16" else nullcontext()
            with torch.inference_mode(), precision:
                return family, found[name](images)

        return call

    calls = {name: caller(name) for name in found}
    milliseconds = {}
    if compare.measures:  # a graph is a whole, without stages to tell apart
        milliseconds = {name: shares(found[name], call) for name, call in calls.items() if not name.endswith(GRAPH)}
    record = compare(
        op="detector",
        case=f"detector: R50-FPN, {batch} x {side} px, {mode}",
        details={"batch": batch, "side": side, "precision": mode, "stages_ms": milliseconds},
        providers=calls,
        check=checker(mode),
        budget=20.0,
        min_rounds=7,
    )
    if record is not None:
        for result in record["providers"].values():
            result["images_per_second"] = round(1e3 * batch / result["median_ms"], 3)
        if compare.records:
            harness.write_record("detector", record, DEVICE)


class Given(nn.Module):
    """In the place of a network: what it said before."""

    def __init__(self, said: Any) -> None:
        super().__init__()
        self.said = said

    def forward(self, *_):
        return self.said


def only_the_part(model: nn.Module, images: list[Tensor]) -> Callable[[], tuple[list, Tensor, list]]:
    """Anchors, proposals, RoI pooling and post-processing, with the networks' outputs given."""
    model = copy.deepcopy(model)
    with torch.inference_mode():
        batch, _ = model.transform(images)
        features = model.backbone(batch.tensors)
        proposals, _ = model.rpn(batch, features)
        pooled = model.roi_heads.box_roi_pool(features, proposals, batch.image_sizes)
        predicted = model.roi_heads.box_predictor(model.roi_heads.box_head(pooled))
        model.rpn.head = Given(model.rpn.head(list(features.values())))
    heads = model.roi_heads

    def call():
        with torch.inference_mode():
            boxes, _ = model.rpn(batch, features)
            maps = heads.box_roi_pool(features, boxes, batch.image_sizes)
            return boxes, maps, heads.postprocess_detections(*predicted, boxes, batch.image_sizes)

    return call


def test_accelerated_part(compare):
    side = 800 if compare.measures else 128
    images = pictures(1, side)
    theirs = torchvisions(images, side)
    ours = doublehead.accelerate(copy.deepcopy(theirs))

    def check(actual, expected):
        (f,), maps, _ = actual
        (e,), expected_maps, _ = expected
        same = box_iou(e, f).max(1)
        close = same.values > 0.99
        assert close.float().mean() > 0.95  # channels-last convolutions round otherwise, and NMS decides otherwise
        difference = (maps[same.indices[close]] - expected_maps[close]).abs().amax((1, 2, 3))
        assert (difference < 0.05 * expected_maps.std()).float().mean() > 0.9

    compare(
        op="detector",
        case=f"detector: proposals, RoI pooling and post-processing alone, {side} px",
        details={"side": side},
        providers={"torchvision": only_the_part(theirs, images), "doublehead": only_the_part(ours, images)},
        check=check,
    )
