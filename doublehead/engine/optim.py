"""The optimiser of the paper's recipe, its learning rate, and the averaged weights."""

from __future__ import annotations

import copy
import random

import numpy as np
import torch
from torch import nn

from doublehead.config import TrainConfig
from doublehead.engine.schedule import learning_rate

__all__ = ["WeightAverage", "build_optimizer", "learning_rate", "seed_step", "set_learning_rate"]


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW, over the trainable parameters, in two groups.

    Biases (of convolutions, linear and normalisation layers alike) learn `bias_lr_factor` times
    faster and do not decay; all other parameters, the scales of normalisation layers among them,
    decay.  This is the rule of the authors' code base (maskrcnn-benchmark).
    Each group's `lr_factor` is multiplied with the scheduled rate.

    Raises:
        ValueError: nothing in `model` is trainable.
    """
    weights, biases = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (biases if name.rpartition(".")[2] == "bias" else weights).append(parameter)
    groups = [
        {"params": weights, "lr_factor": 1.0, "weight_decay": config.weight_decay},
        {"params": biases, "lr_factor": config.bias_lr_factor, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("the model has no trainable parameter: lower model.backbone.frozen_stages")
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999))
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set every group to `rate` times its `lr_factor`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Make every random number of one training step a function of (seed, step, rank) alone.

    So nothing that happens between steps (an evaluation, a loader starting, a stop and a resume)
    changes what a step draws, and no generator state has to be stored.
    """
    mixed = random.Random(f"{seed}/{step}/{rank}").getrandbits(63)
    torch.manual_seed(mixed)  # the CPU's and all CUDA devices' generators
    random.seed(mixed)
    np.random.seed(mixed % 2**32)


class WeightAverage:
    """Exponential moving average of a model's parameters; buffers are copied.

    The decay grows as (1 + n) / (10 + n) up to `decay`, so that the random initial
    weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"train.ema_decay is {decay}: it must lie in [0, 1)")
        self.decay = decay
        self.updates = 0
        self.model = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards `model`."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        mine, theirs = list(self.model.parameters()), list(model.parameters())
        torch._foreach_lerp_(mine, theirs, 1 - decay)
        for own, other in zip(self.model.buffers(), model.buffers(), strict=True):
            own.copy_(other)

    def state_dict(self) -> dict:
        """For `load_state_dict`."""
        return {"updates": self.updates, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Continue from what `state_dict` gave."""
        self.updates = state["updates"]
        self.model.load_state_dict(state["model"])
