"""Counts the weights of the heads that a recipe builds (the paper's Table 2)."""

from __future__ import annotations

import torch
from torch import nn

from doublehead.config import ModelConfig
from doublehead.models.heads import Head, Heads
from doublehead.models.readout import BRANCHES

M = 2**20
"""The paper's unit "M"."""


def tower_weights(config: ModelConfig) -> dict[str, int]:
    """Branch name -> number of weights in its tower's convolutions and fully connected layers, as the paper counts.

    Biases, batch norms, and the classifier and regressor after the tower are left out.  No memory is allocated.

    Raises:
        ValueError: a backbone without a pyramid, whose head is the backbone's own last stage.
    """
    return {name: count_weights(head.tower) for name, head in _heads(config).items()}


def conv_head_weights(config: ModelConfig) -> int | None:
    """The number of weights in the first conv-head's tower; None: there is no conv-head."""
    branches = BRANCHES[config.head.kind]
    found = (count for name, count in tower_weights(config).items() if branches[name].tower == "conv")
    return next(found, None)


def count_weights(module: nn.Module) -> int:
    """The number of weights in all convolutions and fully connected layers of `module`."""
    layers = (layer for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.Linear))
    return sum(layer.weight.numel() for layer in layers)


def _heads(config: ModelConfig) -> dict[str, Head]:
    with torch.device("meta"):
        return dict(Heads(config.head, config.roi, config.backbone.fpn_channels, num_classes=2).items())
