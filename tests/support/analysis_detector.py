"""What the tests of the analysis share: small untrained detectors of the shapes, saved, and few windows."""

from __future__ import annotations

import contextlib
import csv
import json
import sys
from pathlib import Path

import pytest
import torch

from doublehead.config import (
    BackboneConfig,
    DataConfig,
    HeadConfig,
    ImageConfig,
    LossConfig,
    ModelConfig,
    Recipe,
    RoIConfig,
    RPNConfig,
)
from doublehead.data.shapes import CLASSES
from doublehead.engine.checkpoint import save_model

SIDE = 128
AP = dict(zip(CLASSES, (0.1, 0.6, 0.3, 0.5, 0.2, 0.4), strict=True))
METRICS = {"classes": {name: {"AP": ap, "AP50": 0.9} for name, ap in AP.items()}}


def recipe(kind: str, loss: LossConfig | None = None) -> Recipe:
    model = ModelConfig(
        backbone=BackboneConfig("resnet18", "batch_norm", weights=None, frozen_stages=0, fpn_channels=8),
        rpn=RPNConfig((8, 16, 32, 64, 128), pre_nms_test=60, post_nms_test=40),
        roi=RoIConfig(),
        head=HeadConfig(kind, fc_dim=16, conv_dim=16, conv_blocks=1),
        loss=loss or LossConfig(),
        image=ImageConfig(min_size=(SIDE // 2,), max_size=SIDE),
    )
    return Recipe("tiny", "", model, DataConfig("shapes", val_images=4, image_size=SIDE, workers=0))


def save_detector(folder: Path, kind: str = "double_head_ext", classes=CLASSES, loss: LossConfig | None = None) -> Path:
    """The folder of a "run" whose detector says something of every box."""
    from doublehead.models import build_detector

    torch.manual_seed(len(folder.name))
    folder.mkdir(parents=True)
    config = recipe(kind, loss)
    model = build_detector(config.model, len(classes) + 1)
    for name, weight in model.named_parameters():
        if name.endswith(("classifier.weight", "regressor.weight", "classifier.bias")):
            torch.nn.init.normal_(weight, std=0.3)
    save_model(folder / "model.safetensors", model, config, classes, range(1, len(classes) + 1))
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    return folder


def analyze(*arguments) -> int:
    """The command's exit code."""
    from doublehead.cli.analyze import main

    try:
        main([*(str(a) for a in arguments), "--device", "cpu"])
    except SystemExit as stop:
        return stop.code
    return 0


def few_windows() -> None:
    """225 instead of 14,161 for each object."""
    from doublehead.analysis import windows

    windows.SIZES, windows.OFFSETS, windows.WINDOWS = 3, 5, 225


def real_models_few_windows() -> None:
    """For `launch`, which puts `TinyDetector` in the models' place.  Pictures, which take seconds, are left out."""
    for name in [name for name in sys.modules if name.split(".")[:2] == ["doublehead", "models"]]:
        del sys.modules[name]
    few_windows()
    from doublehead.analysis import sliding_windows

    sliding_windows.draw = sliding_windows.draw_differences = lambda path, *_: path.name


@pytest.fixture
def windows_225(monkeypatch):
    from doublehead.analysis import windows

    for name in ("SIZES", "OFFSETS", "WINDOWS"):
        monkeypatch.setattr(windows, name, getattr(windows, name))  # so that it is put back
    few_windows()


@contextlib.contextmanager
def stop_after(monkeypatch, module, images: int, function: str = "measure_image"):
    """Inside, a measurement saves after each image and is killed after so many of them."""
    from doublehead.analysis import shards

    original, count = getattr(module, function), 0

    def measure_image(*arguments):
        nonlocal count
        if count == images:
            raise KeyboardInterrupt
        count += 1
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, function, measure_image)
        patch.setattr(shards, "SAVE_SECONDS", 0.0)
        try:
            yield
        except SystemExit as stop:
            assert stop.code == 130
    assert count == images


def read_table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
