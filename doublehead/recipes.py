"""Every named recipe: `python -m doublehead.train NAME`."""

from __future__ import annotations

import dataclasses

from .config import (
    BackboneConfig,
    DataConfig,
    HeadConfig,
    HeadKind,
    ImageConfig,
    LossConfig,
    ModelConfig,
    Recipe,
    RoIConfig,
    RPNConfig,
    TrainConfig,
)

RECIPES: dict[str, Recipe] = {}
"""Name -> recipe, for the command lines."""


def register(recipe: Recipe) -> Recipe:
    """Make a recipe known to the command lines under its own name."""
    RECIPES[recipe.name] = recipe
    return recipe


def _paper(name: str, about: str, kind: HeadKind, backbone: str) -> Recipe:
    """PAPER section 5.1 on COCO 2017: 8 images a step, 180k steps.  Single heads have loss weight 1 (Table 1)."""
    loss = LossConfig(w_fc=1.0, w_conv=1.0) if kind in ("fc", "conv") else LossConfig()
    model = ModelConfig(backbone=BackboneConfig(backbone), head=HeadConfig(kind), loss=loss)
    return Recipe(name, about, model, DataConfig("coco", "data/coco", "train2017", "val2017", workers=4), TrainConfig())


def _small_model(short_side: int, long_side: int, anchor_sizes: tuple[float, ...]) -> ModelConfig:
    """Ext with narrow heads on ResNet-18 from scratch: what a CPU can train in minutes."""
    return ModelConfig(
        backbone=BackboneConfig(
            "resnet18", "batch_norm", weights=None, frozen_stages=0, fpn_channels=64, fpn_norm=True
        ),
        rpn=RPNConfig(anchor_sizes, pre_nms_train=400, pre_nms_test=200, post_nms_train=200, post_nms_test=100),
        roi=RoIConfig(samples=48, positive_fraction=0.5, canonical_size=float(short_side)),
        head=HeadConfig("double_head_ext", fc_dim=256, conv_dim=128, conv_blocks=3),
        image=ImageConfig((short_side,), long_side),
    )


_SMALL_TRAINING = TrainConfig(
    steps=480,
    batch_size=4,
    optimizer="adamw",  # in so few steps from scratch, SGD gets half as far
    lr=0.001,
    bias_lr_factor=1.0,
    weight_decay=0.01,
    milestones=(345, 440),
    warmup_steps=50,
    clip_grad_norm=10.0,
    checkpoint_every=100,
    aspect_ratio_grouping=False,
)

register(
    Recipe(
        "shapes-ext",
        "the demonstration: a small Double-Head-Ext on generated shapes, minutes on a CPU",
        _small_model(128, 128, (12, 24, 48, 96, 160)),
        DataConfig("shapes", train_images=2000, val_images=200),
        _SMALL_TRAINING,
    )
)
register(
    Recipe(
        "bccd-small",
        "a small Double-Head-Ext on BCCD blood cells (Pascal VOC layout), from scratch on a CPU",
        _small_model(192, 256, (12, 24, 48, 96, 160)),
        DataConfig("voc", "data/BCCD", "train", "val", on_bad_record="skip"),
        _SMALL_TRAINING,
    )
)
register(
    Recipe(
        "tiny-coco-overfit",
        "a check of the machinery: a small Double-Head-Ext learns ten COCO images by heart",
        _small_model(256, 384, (16, 32, 64, 128, 256)),
        DataConfig("coco", "data/tiny_coco", "train2017", "train2017", train_images=10, val_images=10),
        dataclasses.replace(
            _SMALL_TRAINING, steps=900, batch_size=2, milestones=(650, 800), checkpoint_every=200, horizontal_flip=0.0
        ),
    )
)
for _name, _about, _kind, _backbone in (
    ("faster-rcnn-r50-fpn", "the FPN baseline of Table 4: one fc-head for both tasks", "fc", "resnet50"),
    (
        "double-head-r50-fpn",
        "Double-Head of Table 4: the fc-head classifies, the conv-head regresses",
        "double_head",
        "resnet50",
    ),
    ("double-head-ext-r50-fpn", "Double-Head-Ext of Table 4: both heads do both", "double_head_ext", "resnet50"),
    ("double-head-ext-r101-fpn", "Double-Head-Ext of Tables 4 and 5, ResNet-101", "double_head_ext", "resnet101"),
):
    register(_paper(_name, _about, _kind, _backbone))
