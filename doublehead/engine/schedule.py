"""The learning rate of each step, and how the schedule follows a changed number of steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from doublehead.config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of step `step` (from 0): linear warm-up, then times `gamma` at each milestone, or along half a cosine.

    The cosine begins with the full rate at the end of the warm-up and would reach 0 one step after the last.
    """
    if config.schedule == "cosine":
        done = max(0, step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        rate = config.lr * (1 + math.cos(math.pi * min(1.0, done))) / 2
    else:
        rate = config.lr * config.gamma ** sum(milestone <= step for milestone in config.milestones)
    if step < config.warmup_steps:
        progress = step / config.warmup_steps
        rate *= config.warmup_factor + (1 - config.warmup_factor) * progress
    return rate


def scaled(config: TrainConfig, steps: int, warmup: bool = True) -> TrainConfig:
    """`config` with its milestones (and warm-up), made for `steps` steps, scaled to its own number of steps."""
    changes = {"milestones": tuple(max(1, milestone * config.steps // steps) for milestone in config.milestones)}
    if warmup:
        changes["warmup_steps"] = config.warmup_steps * config.steps // steps
    return replace(config, **changes)


def describe(config: TrainConfig) -> str:
    """The schedule in a few words."""
    milestones = ", ".join(map(str, config.milestones)) or "none"
    return f"milestones {milestones}, warm-up {config.warmup_steps}"


def notes(config: TrainConfig) -> Iterator[str]:
    """Notes on parts of the schedule that lie after the last step."""
    late = [str(milestone) for milestone in config.milestones if milestone >= config.steps]
    if late:
        yield (
            f"train.milestones {', '.join(late)}: never reached in {config.steps} steps, the learning rate does not "
            "fall there"
        )
    if config.warmup_steps > config.steps:
        yield (
            f"train.warmup_steps {config.warmup_steps}: longer than the {config.steps} steps, the learning rate never "
            f"reaches {config.lr:g}"
        )


def notes_of_more_steps(config: TrainConfig, before: TrainConfig, step: int) -> Iterator[str]:
    """Notes on resuming at `step` with more steps than `before`: the rate may have dropped already."""
    passed = [str(milestone) for milestone in config.milestones if milestone <= step]
    if config.steps > before.steps and config.milestones == before.milestones and passed:
        rate = learning_rate(step, config)
        yield (
            f"more steps, the same milestones: the learning rate has fallen at {', '.join(passed)} and goes on with "
            f"{rate:g}; --train.milestones changes that"
        )
