"""Batch norms, and the learning rate and weight decay that each parameter really sees, against the release's rules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from plain_heads import BIAS_FACTOR, EPS, NORM_MOMENTUM, Schedule
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from doublehead.config import HeadConfig, ModelConfig, RoIConfig, TrainConfig
from doublehead.engine.optim import build_optimizer, learning_rate, set_learning_rate
from doublehead.models.detector import DoubleHeadRCNN, build_detector
from doublehead.models.heads import Heads
from doublehead.recipes import RECIPES

STEPS = (0, 1, 250, 499, 500, 501, 119_999, 120_000, 159_999, 160_000, 179_999)
RELEASE = Schedule(0.01, warmup=500, milestones=(120_000, 160_000))


def norm_settings(heads: nn.Module) -> float:
    """The largest difference of a batch norm's eps or momentum from the release's; infinite: another kind of norm."""
    largest = 0.0
    for layer in heads.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            if type(layer) is not nn.BatchNorm2d or not layer.affine or not layer.track_running_stats:
                return float("inf")
            largest = max(largest, abs(layer.eps - EPS), abs(layer.momentum - NORM_MOMENTUM))
    return largest


class Moved(NamedTuple):
    """How many tensors change in a training of whole detectors."""

    frozen: int
    """Of the backbone's norms and of its frozen stages: none should."""
    statistics: int
    """Of the heads' running statistics that do not: none should stay."""
    others: int
    """Of the trainable parameters that do not: none should stay."""


def train_detector(steps: int = 2) -> Moved:
    """Train a small detector as the paper's: a ResNet with frozen norms, stem and first stage, below live heads."""
    config: ModelConfig = RECIPES["miniature-double-head-ext"].model
    config = replace(config, backbone=replace(config.backbone, weights=None))
    torch.manual_seed(0)
    model = build_detector(config, 3).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = build_optimizer(model, TrainConfig(lr=1e-3))
    set_learning_rate(optimizer, 1e-3)
    images = torch.rand(2, 3, 64, 64)
    target = {"boxes": torch.tensor([[8.0, 8, 40, 48], [20, 10, 60, 30]]), "labels": torch.tensor([1, 2])}
    for _ in range(steps):
        optimizer.zero_grad()
        sum(model(images, [target, target]).values()).backward()
        optimizer.step()
    same = {name for name, tensor in model.state_dict().items() if tensor.equal(before[name])}
    frozen = set(frozen_names(model))
    of_heads = {name for name in before if "heads." in name and "running" in name}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return Moved(len(frozen - same), len(of_heads & same), len((trainable - frozen - zero_gradient(model)) & same))


def frozen_names(model: DoubleHeadRCNN) -> Iterator[str]:
    """The tensors of frozen norms, and those of the stem and the first stage."""
    for name, layer in model.named_modules():
        if isinstance(layer, FrozenBatchNorm2d) or name.endswith(("body.conv1", "body.layer1")):
            yield from (f"{name}.{key}" for key in layer.state_dict())


def zero_gradient(model: DoubleHeadRCNN) -> set[str]:
    """Biases that a batch norm takes off again."""
    return {name for name, _ in model.named_parameters() if name.endswith(".out.bias")}


class Rates(NamedTuple):
    """The largest relative differences from the release's rules, over parameters and steps."""

    rate: float
    decay: float
    change: float
    """What a step of the optimiser really changes, gradients of 1."""


def rates(kind: str = "double_head_ext") -> Rates:
    """Of every parameter of heads, over warm-up and milestones: weights, biases, norms' scales and shifts."""
    torch.manual_seed(0)
    heads = Heads(HeadConfig(kind, fc_dim=16, conv_dim=32, conv_blocks=3), RoIConfig(), 4, 3).double()
    config, largest = TrainConfig(), Rates(0.0, 0.0, 0.0)
    for step in STEPS:
        optimizer = build_optimizer(heads, config)
        set_learning_rate(optimizer, learning_rate(step, config))
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        before = {name: parameter.detach().clone() for name, parameter in heads.named_parameters()}
        for parameter in heads.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        for name, parameter in heads.named_parameters():
            bias = "bias" in name  # the release looks for the word anywhere in the name
            rate, decay = RELEASE.at(step) * (BIAS_FACTOR if bias else 1.0), 0.0 if bias else 1e-4
            group, expected = groups[id(parameter)], rate * (1 + decay * before[name])
            change = (before[name] - parameter.detach() - expected).abs().max().item() / rate
            found = abs(group["lr"] / rate - 1), abs(group["weight_decay"] - decay) / 1e-4, change
            largest = Rates(*(max(pair) for pair in zip(largest, found, strict=True)))
    return largest
