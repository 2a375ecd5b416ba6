"""Whole detectors with random weights, scaled so that there are proposals and detections, and pictures for them."""

from __future__ import annotations

import copy
import dataclasses
import os
from pathlib import Path

import harness
import torch
from inputs import DEVICE
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.ops import FrozenBatchNorm2d

import doublehead
from doublehead.config import ImageConfig, ModelConfig
from doublehead.interop.torchvision import convert_faster_rcnn, faster_rcnn_config
from doublehead.models import build_detector
from doublehead.recipes import RECIPES

CLASSES = 91
GRAPH = ", one graph"
"""Suffix of the name of a model that runs as one CUDA graph."""
SHARED = ("detector.backbone.", "detector.rpn.")
RECIPE = {"Double-Head": "double-head-r50-fpn", "Double-Head-Ext": "double-head-ext-r50-fpn"}


def pictures(count: int, side: int) -> list[Tensor]:
    """Pictures of the test data if it is present, else generated ones; shorter side at most `side`."""
    folder = Path(os.environ.get("DOUBLEHEAD_TEST_DATA") or harness.ROOT.parent / "shared" / "data")
    files = sorted(folder.glob("tiny_coco/**/*.jpg"))
    if files:
        from doublehead.data.images import read_image  # needs more packages than the models do

        found = [read_image(file) / 255 for file in files[:count]]
    else:
        found = [drawn(image) for image in range(count)]
    found = (found * count)[:count]
    factor = min(1.0, side / 480)
    return [nn.functional.interpolate(x[None], scale_factor=factor, mode="bilinear")[0].to(DEVICE) for x in found]


def drawn(seed: int, side: int = 480) -> Tensor:
    """`Tensor[3, side, side]` in 0 .. 1: eight filled rectangles on a gradient, under noise."""
    random = torch.Generator().manual_seed(seed)
    picture = torch.linspace(0, 1, side).expand(3, side, side) * torch.rand(3, 1, 1, generator=random)
    for _ in range(8):
        x, y, width, height = (torch.rand(4, generator=random) * side / 2).int().tolist()
        picture[:, y : y + height, x : x + width] = torch.rand(3, 1, 1, generator=random)
    return (picture + 0.05 * torch.randn(3, side, side, generator=random)).clamp(0, 1)


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
    for name, layer in norms.items():
        layer.momentum = 1.0
        if name.endswith("bn3"):  # small, as in trained networks: rounding errors do not grow from block to block
            nn.init.constant_(layer.weight, 0.2)
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
    """Our configuration with torchvision's frozen batch norms, this image size and number of proposals."""
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
    # Every RoI passes all heads first, so that the outputs of each head are measured.
    skipping = model.detector.readout
    model.detector.readout = skipping.replace(skip=False)
    lively(model, images, largest)
    model.detector.readout = skipping
    return model


def models(images: list[Tensor], side: int, proposals: int) -> dict[str, nn.Module]:
    theirs = torchvisions(images[:1], side, proposals)
    ours = fc_kind(theirs, side, proposals)
    shared = {name: value for name, value in ours.state_dict().items() if name.startswith(SHARED)}
    found = {"torchvision": theirs, "doublehead": doublehead.accelerate(copy.deepcopy(theirs)), "fc kind": ours}
    for name, recipe in RECIPE.items():
        found[name] = double_head(adapted(RECIPES[recipe].model, side, proposals), shared, images[:1])
    return found


def as_graphs(found: dict[str, nn.Module], images: list[Tensor], mode: str) -> dict[str, nn.Module]:
    """Copies of our models that run as one graph."""
    graphs = {}
    for name in ("fc kind", *RECIPE):
        model = graphs[name + GRAPH] = copy.deepcopy(found[name])
        with torch.inference_mode():
            height, width = model.transform(images)[0].pixels.shape[-2:]
        model.compile_graph(len(images), height, width, torch.bfloat16 if mode == "bfloat16" else torch.float32)
    return graphs
