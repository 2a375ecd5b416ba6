"""What the tests of `analyze heads` share: an untrained detector to start from, and options that take seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from doublehead.analysis.options import EvaluationData, Heads
from doublehead.config import BackboneConfig, DataConfig, RoIConfig, RPNConfig, TrainConfig
from doublehead.data.shapes import CLASSES
from doublehead.engine.checkpoint import save_model
from doublehead.models import build_detector
from tests.support.analysis_detector import recipe

STEPS = 4
KINDS = ("fc", "conv", "double_fc", "double_conv", "double_head_reverse", "double_head", "double_head_ext")
WIDE = "model.head.conv_dim=32"
OTHER_ROIS = "model.roi.samples=8,model.roi.positive_fraction=0.25"


def save_start(folder: Path) -> Path:
    """The folder of an untrained detector whose backbone has no statistics to learn."""
    base = recipe("double_head_ext")
    model = replace(
        base.model,
        backbone=BackboneConfig("resnet18", "frozen_batch_norm", weights=None, frozen_stages=0, fpn_channels=8),
        rpn=RPNConfig((8, 16, 32, 64, 128), pre_nms_train=60, pre_nms_test=60, post_nms_train=40, post_nms_test=40),
        roi=RoIConfig(samples=16, positive_fraction=0.5, canonical_size=64.0),
        head=replace(base.model.head, conv_blocks=3),
    )
    # The optimiser that a detector and its heads share must not be one that mixes parameters, as clipping does.
    train = TrainConfig(steps=STEPS, batch_size=2, lr=0.02, milestones=(3,), warmup_steps=2, channels_last=True,
                        device="cpu", aspect_ratio_grouping=False, clip_grad_norm=None)  # fmt: skip
    data = DataConfig("shapes", train_images=6, val_images=4, image_size=64, workers=0)
    whole = replace(base, model=model, train=train, data=data)
    torch.manual_seed(5)
    detector = build_detector(model, 7)
    for name, weight in detector.detector.rpn.named_parameters():  # proposals of many sizes, near the anchors
        torch.nn.init.normal_(weight, std=0.3 if "objectness" in name else 0.02)
    save_model(folder / "model.safetensors", detector, whole, CLASSES, range(1, 7))
    return folder


def options(start: Path, out: Path, **changes) -> Heads:
    """Of a training that takes seconds."""
    given = {"seeds": (3,), "steps": STEPS, "images": 1, "windows": 4, "kinds": KINDS, "save_models": KINDS}
    return Heads(str(out), "cpu", str(start), EvaluationData(), **(given | changes))
