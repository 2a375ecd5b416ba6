"""Whole detectors side by side on the same pictures, and the part of them that `doublehead.accelerate` replaces.

First a gate: in float64, where rounding decides nothing, the accelerated model and this library's `fc` kind must find
exactly what torchvision's model finds.  Weights are random, but such that there is something to suppress and to detect.
The Double-Head models share the backbone's and the RPN's weights, so that their proposals are the same.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import harness
import pytest
import torch
from inputs import DEVICE
from torch import Tensor, nn

pytest.importorskip("torchvision")

from detectors import GRAPH, RECIPE, as_graphs, models, pictures, torchvisions  # noqa: E402
from post_processing import agreement  # noqa: E402

import doublehead  # noqa: E402
from doublehead.config import ImageConfig  # noqa: E402
from doublehead.models import detector  # noqa: E402
from doublehead.ops import box_iou  # noqa: E402

MODES = ["float32"] if DEVICE == "cpu" else ["float32", "bfloat16"]
AGREE = {"float32": 0.9, "bfloat16": 0.3}
"""Share of detections with a counterpart: rounding alone changes some in a random network, 16 bits many."""


# ---------------------------------------------------------------------------------------------
# Checks


def gate(found: dict[str, nn.Module]) -> None:
    """In float64 the same detections in the same order, on a small picture."""
    side = 128
    image = [pictures(1, side)[0].double()]
    results = {}
    for name in ("torchvision", "doublehead", "fc kind"):
        model = copy.deepcopy(found[name]).double()
        if name == "fc kind":
            model.transform.config = ImageConfig(min_size=(side,), max_size=2 * side)
        else:
            model.transform.min_size, model.transform.max_size = (side,), 2 * side
            normal = found["fc kind"].config.image
            mean, std = (torch.tensor(values).tolist() for values in (normal.mean, normal.std))  # as float32 has them
            model.transform.image_mean, model.transform.image_std = mean, std
        with torch.inference_mode():
            results[name] = model(image)[0]
    expected = results.pop("torchvision")
    assert len(expected["boxes"]) > 5
    for result in results.values():
        assert result["labels"].tolist() == expected["labels"].tolist()
        torch.testing.assert_close(result["boxes"], expected["boxes"], atol=1e-2, rtol=0)
        torch.testing.assert_close(result["scores"], expected["scores"], atol=1e-4, rtol=0)


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
# Stages


def stages(model: nn.Module) -> list[tuple[object, str, str]]:
    """(object, its function, stage); of nested ones the time counts for the innermost."""
    if hasattr(model, "roi_heads"):
        return [
            (model.transform, "forward", "transform"), (model.transform, "postprocess", "transform"),
            (model.backbone, "forward", "backbone"), (model.rpn, "forward", "rpn"),
            (model.roi_heads, "forward", "roi, heads"),
            (model.roi_heads, "postprocess_detections", "post-processing"),
        ]  # fmt: skip
    return [
        (model.transform, "forward", "transform"), (model.transform, "detections", "transform"),
        (model.detector.backbone, "forward", "backbone"), (model.detector.rpn, "forward", "rpn"),
        (detector, "run_heads", "roi, heads"), (detector, "detect", "post-processing"),
    ]  # fmt: skip


@contextmanager
def timed(functions: Iterable[tuple[object, str, str]]) -> Iterator[dict[str, float]]:
    """Seconds in each stage while this is open."""
    seconds: dict[str, float] = {}
    inner = [0.0]

    def watch(function: Callable, stage: str) -> Callable:
        def run(*args, **kwargs):
            inner.append(0.0)
            started = now()
            try:
                return function(*args, **kwargs)
            finally:
                spent = now() - started
                seconds[stage] = seconds.get(stage, 0.0) + spent - inner.pop()
                inner[-1] += spent

        return run

    with pytest.MonkeyPatch.context() as patch:
        for owner, name, stage in functions:
            patch.setattr(owner, name, watch(getattr(owner, name), stage))
        yield seconds


def now() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def shares(model: nn.Module, call: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of each stage, mean of two calls."""
    with timed(stages(model)) as seconds:
        call()
        call()
    return {stage: round(value * 1e3 / 2, 2) for stage, value in seconds.items()}


# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1] if DEVICE == "cpu" else [1, 16])
@pytest.mark.parametrize("mode", MODES)
def test_detector(compare, mode, batch):
    side = 800 if compare.measures else 128
    images = pictures(batch, side)
    found = models(images, side, proposals=1000 if compare.measures else 30)
    gate(found)
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
        budget=90.0 if DEVICE == "cpu" else 20.0,
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
