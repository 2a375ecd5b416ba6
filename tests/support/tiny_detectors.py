"""Real detectors with few channels, with something to find, and their batches."""

from __future__ import annotations

import torch

from doublehead.config import BackboneConfig, HeadConfig, ImageConfig, ModelConfig, RoIConfig, RPNConfig
from doublehead.models import ImageBatch
from doublehead.models.structures import pad_targets


def tiny(kind: str) -> ModelConfig:
    return ModelConfig(
        backbone=BackboneConfig("resnet18", "batch_norm", weights=None, frozen_stages=0, fpn_channels=16),
        rpn=RPNConfig(
            (8, 16, 32, 64, 128), pre_nms_train=60, pre_nms_test=60, post_nms_train=40, post_nms_test=30, straddle=0.0
        ),
        roi=RoIConfig(samples=16),
        head=HeadConfig(kind, fc_dim=16, conv_dim=32, conv_blocks=3),
        image=ImageConfig(min_size=(64,), max_size=96),
    )


def batch(height: int = 64, width: int = 96) -> ImageBatch:
    return ImageBatch(torch.randn(2, 3, height, width), torch.tensor([[64.0, 90.0], [50.0, 96.0]]))


def targets():
    boxes = [torch.tensor([[5.0, 5, 30, 40]]), torch.tensor([[10.0, 8, 60, 45], [50, 20, 80, 44]])]
    return pad_targets(boxes, [torch.tensor([1]), torch.tensor([2, 3])])


def lively(detector):
    """An untrained detector finds nothing: give its batch norms their scales and its classifiers something to say."""
    for layer in detector.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        detector.train()(batch(), targets())
    for head in detector.heads.values():
        if head.classifier is not None:
            torch.nn.init.normal_(head.classifier.weight, std=0.5)
    return detector.eval()


def shallow(detector):
    """Keep the first block of each of the ResNet's stages: the next is like it, and tracing it takes as long again."""
    body = detector.backbone.body
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        setattr(body, stage, getattr(body, stage)[:1])
    return detector
