"""Whole detectors side by side on the same pictures, and the part of them that `doublehead.accelerate` replaces.

First a gate: in float64, where rounding decides nothing, the accelerated model and this library's `fc` kind must find
exactly what torchvision's model finds.  Weights are random, but such that there is something to suppress and to detect.
The Double-Head models share the backbone's and the RPN's weights, so that their proposals are the same.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from inputs import DEVICE
from torch import Tensor, nn

pytest.importorskip("torchvision")

from torchvision.models.detection import fasterrcnn_resnet50_fpn  # noqa: E402
from torchvision.ops import FrozenBatchNorm2d  # noqa: E402

import doublehead  # noqa: E402
from doublehead.config import ImageConfig, ModelConfig  # noqa: E402
from doublehead.data.images import read_image  # noqa: E402
from doublehead.data.shapes import ShapesDataset  # noqa: E402
from doublehead.interop.torchvision import convert_faster_rcnn, faster_rcnn_config  # noqa: E402
from doublehead.models import build_detector, detector  # noqa: E402
from doublehead.ops import box_iou  # noqa: E402
from doublehead.recipes import RECIPES  # noqa: E402

CLASSES = 91
SHARED = ("detector.backbone.", "detector.rpn.")
RECIPE = {"Double-Head": "double-head-r50-fpn", "Double-Head-Ext": "double-head-ext-r50-fpn"}
MODES = ["float32"] if DEVICE == "cpu" else ["float32", "bfloat16"]
AGREE = {"float32": 0.9, "bfloat16": 0.3}
"""Share of detections with a counterpart: rounding alone changes some in a random network, 16 bits many."""


def pictures(count: int, side: int) -> list[Tensor]:
    """Real ones where they are, else generated; resized so that the shorter side is at most `side`."""
    folder = Path(os.environ.get("DOUBLEHEAD_TEST_DATA") or harness.ROOT.parent / "shared" / "data")
    files = sorted(folder.glob("tiny_coco/**/*.jpg"))
    if files:
        found = [read_image(file) for file in files[:count]]
    else:
        dataset = ShapesDataset("val", count, side=480)
        found = [dataset[i][0] for i in range(count)]
    found = [x / 255 if x.dtype == torch.uint8 else x for x in found]
    found = (found * count)[:count]
    factor = min(1.0, side / 480)
    return [nn.functional.interpolate(x[None], scale_factor=factor, mode="bilinear")[0].to(DEVICE) for x in found]


def lively(model: nn.Module, images: list[Tensor], largest: dict[nn.Module, float]) -> nn.Module:
    """Scale the weights of some layers so that their largest output on `images` is as given."""
    seen = dict.fromkeys(largest, 0.0)

    def watch(layer, _, output):
        seen[layer] = max(seen[layer], output.abs().max().item())

    hooks = [layer.register_forward_hook(watch) for layer in largest]
    with torch.no_grad():
        model.eval()(images)
        for hook, (layer, size) in zip(hooks, largest.items(), strict=True):
            hook.remove()
            layer.weight.mul_(size / seen[layer])
    return model


def torchvisions(images: list[Tensor], side: int, proposals: int = 1000) -> nn.Module:
    """fasterrcnn_resnet50_fpn as it is with pretrained weights: its batch norms frozen."""
    torch.manual_seed(0)
    model = fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=CLASSES, min_size=side, max_size=side * 5 // 3,
        rpn_post_nms_top_n_test=proposals,
    ).to(DEVICE)  # fmt: skip
    norms = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)}
    for layer in norms.values():
        layer.momentum = 1.0
    with torch.no_grad():
        model.backbone.train()(model.transform(images)[0].tensors)
    for name, layer in norms.items():
        frozen = FrozenBatchNorm2d(layer.num_features, layer.eps).to(DEVICE)
        frozen.load_state_dict(layer.state_dict())
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, frozen)
    model = lively(model, images, {model.rpn.head.cls_logits: 8.0, model.rpn.head.bbox_pred: 1.0})
    predictor = model.roi_heads.box_predictor
    return lively(model, images, {predictor.cls_score: 9.0, predictor.bbox_pred: 3.0})


def adapted(config: ModelConfig, side: int, proposals: int) -> ModelConfig:
    """torchvision's frozen batch norms, this side and so many proposals."""
    return dataclasses.replace(
        config,
        backbone=dataclasses.replace(config.backbone, weights=None, norm="frozen_batch_norm"),
        image=ImageConfig(min_size=(side,), max_size=side * 5 // 3),
        rpn=dataclasses.replace(config.rpn, post_nms_test=proposals),
    )


def fc_kind(theirs: nn.Module, side: int, proposals: int) -> nn.Module:
    ours = build_detector(adapted(faster_rcnn_config(), side, proposals), CLASSES).to(DEVICE).eval()
    ours.load_state_dict(convert_faster_rcnn(theirs.state_dict()))
    return ours


def double_head(config: ModelConfig, shared: dict[str, Tensor], images: list[Tensor]) -> nn.Module:
    torch.manual_seed(1)
    model = build_detector(config, CLASSES).to(DEVICE)
    unused = model.load_state_dict(shared, strict=False)
    assert not unused.unexpected_keys and not any(name.startswith(SHARED) for name in unused.missing_keys)
    largest = {}
    for head in model.detector.heads.values():
        largest |= {layer: 9.0 for layer in (head.classifier,) if layer is not None}
        largest |= {layer: 3.0 for layer in (head.regressor,) if layer is not None}
    # First every RoI passes all heads, so that each head's outputs are seen.
    whole = dataclasses.replace(model.detector.detection, skip=False)
    skipping, model.detector.detection = model.detector.detection, whole
    lively(model, images, largest)
    model.detector.detection = skipping
    return model


def models(images: list[Tensor], side: int, proposals: int) -> dict[str, nn.Module]:
    theirs = torchvisions(images[:1], side, proposals)
    ours = fc_kind(theirs, side, proposals)
    shared = {name: value for name, value in ours.state_dict().items() if name.startswith(SHARED)}
    found = {"torchvision": theirs, "doublehead": doublehead.accelerate(copy.deepcopy(theirs)), "fc kind": ours}
    for name, recipe in RECIPE.items():
        found[name] = double_head(adapted(RECIPES[recipe].model, side, proposals), shared, images[:1])
    return found


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
        shares = []
        for f, e in zip(found, expected[1], strict=True):
            same = (box_iou(e["boxes"], f["boxes"]) > 0.9) & (e["labels"][:, None] == f["labels"])
            shares.append(same.any(1).float().mean())
        assert torch.stack(shares).mean() > AGREE[mode]

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
def test_detector(compare, request, mode, batch):
    side = 800 if compare.measures else 128
    images = pictures(batch, side)
    found = models(images, side, proposals=1000 if compare.measures else 30)
    gate(found)

    def caller(name: str) -> Callable[[], tuple[str, list[dict]]]:
        family = name if name in RECIPE else "Faster R-CNN"

        def call():
            precision = torch.autocast("cuda", torch.bfloat16) if mode == "bfloat16" else nullcontext()
            with torch.inference_mode(), precision:
                return family, found[name](images)

        return call

    calls = {name: caller(name) for name in found}
    milliseconds = {name: shares(found[name], call) for name, call in calls.items()} if compare.measures else {}
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
        if request.config.getoption("benchmark_only"):
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
