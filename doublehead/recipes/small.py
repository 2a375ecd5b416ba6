"""Small detectors that a CPU trains from scratch in minutes."""

from __future__ import annotations

import dataclasses

from doublehead.config import (
    BackboneConfig,
    DataConfig,
    HeadConfig,
    ImageConfig,
    ModelConfig,
    Recipe,
    RoIConfig,
    RPNConfig,
    TrainConfig,
)

SHAPES_ANCHORS = (12, 24, 48, 96, 160)


def small_model(short_side: int, long_side: int, anchor_sizes: tuple[float, ...]) -> ModelConfig:
    """Ext with narrow heads on ResNet-18 from scratch: what a CPU can train in minutes."""
    return ModelConfig(
        backbone=BackboneConfig(
            name="resnet18", norm="batch_norm", weights=None, frozen_stages=0, fpn_channels=64, fpn_norm=True
        ),
        rpn=RPNConfig(anchor_sizes, pre_nms_train=400, pre_nms_test=200, post_nms_train=200, post_nms_test=100),
        roi=RoIConfig(samples=48, positive_fraction=0.5, canonical_size=float(short_side)),
        head=HeadConfig("double_head_ext", fc_dim=256, conv_dim=128, conv_blocks=3),
        image=ImageConfig((short_side,), long_side),
    )


SMALL_TRAINING = TrainConfig(
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


def small_recipes() -> list[Recipe]:
    """The demonstration, BCCD and the check of the machinery."""
    overfit = dataclasses.replace(
        SMALL_TRAINING, steps=900, batch_size=2, milestones=(650, 800), checkpoint_every=200, horizontal_flip=0.0
    )
    return [
        Recipe(
            "shapes-ext",
            "the demonstration: a small Double-Head-Ext on generated shapes, minutes on a CPU",
            small_model(128, 128, SHAPES_ANCHORS),
            DataConfig("shapes", train_images=2000, val_images=200),
            SMALL_TRAINING,
        ),
        Recipe(
            "bccd-small",
            "a small Double-Head-Ext on BCCD blood cells (Pascal VOC layout), from scratch on a CPU",
            small_model(192, 256, SHAPES_ANCHORS),
            DataConfig("voc", "data/BCCD", "train", "val"),
            SMALL_TRAINING,
        ),
        Recipe(
            "tiny-coco-overfit",
            "a check of the machinery: a small Double-Head-Ext learns ten COCO images by heart",
            small_model(256, 384, (16, 32, 64, 128, 256)),
            DataConfig("coco", "data/tiny_coco", "train2017", "train2017", train_images=10, val_images=10),
            overfit,
        ),
    ]
