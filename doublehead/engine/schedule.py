"""The learning rate of each step, and how the schedule follows a changed number of steps."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import replace

from doublehead.config import TrainConfig
from doublehead.errors import UserError


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


def planned(
    train: TrainConfig, reference: TrainConfig, given: Collection[str], images: int, *, resumed: bool = False
) -> tuple[TrainConfig, list[str]]:
    """`train` with its number of steps worked out, and the schedule scaled to it; and notes for the user.

    `epochs` decides the steps if the user set it, or if it stands in the recipe and he did not set `steps`; a resumed
    run keeps its steps unless he sets one of the two.  Milestones and warm-up are those of `reference`'s steps and are
    scaled with them, but for a schedule that the user set, and for a resumed run, whose steps so far followed it.

    Args:
        train: the recipe's optimisation with the user's changes.
        reference: the recipe's own, whose schedule is for its own steps.
        given: dotted names of the fields that the user set, such as `train.steps`.
        images: the number of training images.
        resumed: whether an earlier run goes on.

    Raises:
        UserError: both steps and epochs are given.
    """
    check_length(train, given)
    by_steps = "train.steps" in given
    by_epochs = train.epochs is not None and ("train.epochs" in given or not (resumed or by_steps))
    notes = []
    if by_epochs:
        train = replace(train, steps=max(1, math.ceil(train.epochs * images / train.batch_size - 1e-6)))
        notes.append(
            f"{train.epochs:g} epochs of {images} images, {train.batch_size} at a time, are {train.steps} steps"
        )
    elif by_steps:
        train = replace(train, epochs=None)
    if resumed or train.steps == reference.steps or "train.milestones" in given:
        return train, notes
    fitted = scaled(train, reference.steps, warmup="train.warmup_steps" not in given)
    if fitted != train:
        notes.append(f"{train.steps} steps: the schedule keeps its shape: {describe(fitted)}")
    return fitted, notes


def check_length(train: TrainConfig, given: Collection[str]) -> None:
    """Refuse steps and epochs together, before data are read.

    Raises:
        UserError: both are in `given`.
    """
    if train.epochs is not None and {"train.steps", "train.epochs"} <= set(given):
        raise UserError("train.steps and train.epochs exclude each other: give one of them, the other follows")


def scaled(config: TrainConfig, steps: int, warmup: bool = True) -> TrainConfig:
    """`config` with its milestones (and warm-up), made for `steps` steps, scaled to its own number of steps."""
    changes = {"milestones": tuple(max(1, milestone * config.steps // steps) for milestone in config.milestones)}
    if warmup:
        changes["warmup_steps"] = config.warmup_steps * config.steps // steps
    return replace(config, **changes)


def describe(config: TrainConfig) -> str:
    """The schedule in a few words."""
    milestones = ", ".join(map(str, config.milestones)) or "none"
    shape = f"milestones {milestones}" if config.schedule == "step" else "half a cosine to 0"
    return f"{shape}, warm-up {config.warmup_steps}"


def notes(config: TrainConfig) -> Iterator[str]:
    """Notes on parts of the schedule that lie after the last step."""
    late = [str(milestone) for milestone in config.milestones if milestone >= config.steps]
    if late and config.schedule == "step":
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
    """Notes on resuming at `step` with another number of steps than `before`, or another schedule.

    The rate may have dropped already, and a cosine is stretched.
    """
    passed = [str(milestone) for milestone in config.milestones if milestone <= step]
    if "cosine" in (config.schedule, before.schedule):
        if (config.schedule, config.steps) != (before.schedule, before.steps) and step > 0:
            then, now = learning_rate(step - 1, before), learning_rate(step, config)
            yield (
                f"train.schedule {config.schedule} over {config.steps} steps, {before.schedule} over {before.steps} "
                f"until here: the learning rate was {then:.3g} and goes on with {now:.3g}"
            )
    elif config.steps > before.steps and config.milestones == before.milestones and passed:
        rate = learning_rate(step, config)
        yield (
            f"more steps, the same milestones: the learning rate has fallen at {', '.join(passed)} and goes on with "
            f"{rate:g}; --train.milestones changes that"
        )
