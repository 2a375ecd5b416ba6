"""What a training says before its first step: what is trained, on what data and device, and notes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from doublehead.config import Recipe
from doublehead.data import DetectionDataset
from doublehead.engine.distributed import World
from doublehead.engine.files import RECIPE_FILE, read_recipe
from doublehead.engine.logs import say
from doublehead.engine.resume import changes
from doublehead.engine.schedule import notes, notes_of_more_steps
from doublehead.engine.trainer import Trainer


def say_start(
    recipe: Recipe,
    folder: Path,
    world: World,
    training: DetectionDataset,
    trainer: Trainer,
    state: dict[str, Any] | None,
    machine: dict[str, Any],
    data: str,
    start_from: str | None = None,
    notes_of_fitting: Sequence[str] = (),
) -> None:
    """Print it; nothing is written yet.

    Args:
        state: the state that the run goes on from; None: it begins.
        machine: what sums are split over now (see `Run`).
        data: one line about the data.
        start_from: what is taken of a trained detector.
        notes_of_fitting: what was changed in the recipe.
    """
    config, model, image = recipe.train, trainer.model, recipe.model.image
    weights = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    shown = ", ".join(training.classes[:8]) + (", ..." if len(training.classes) > 8 else "")
    options = [f"amp {config.amp}"] if config.amp != "off" else []
    options += [f"{config.accumulate} accumulation steps"] if config.accumulate > 1 else []
    options += [f"weights averaged ({config.ema_decay})"] if config.ema_decay is not None else []
    options += ["all done: the results are made again"] if trainer.step >= config.steps else []
    steps = f"{config.steps}" if state is None else f"{trainer.step} -> {config.steps}"
    lines = {
        "recipe": f"{recipe.name}: {recipe.about}",
        "data": data,
        "classes": f"{len(training.classes)}: {shown}",
        "model": f"{recipe.model.head.kind}, {recipe.model.backbone.name}, "
        f"{weights / 1e6:.1f} M parameters, {trained / 1e6:.1f} M trained",
        "images": f"short side {', '.join(map(str, image.min_size))} pixels, long side at most {image.max_size}",
        "steps": ", ".join([f"{steps} x {config.batch_size} images", *options]),
        "device": _device_name(world),
        "folder": f"{folder}" + (" (resumed)" if state is not None else ""),
    }
    if start_from:
        lines["from"] = start_from
    if training.left_out():
        lines["left out"] = f"of training: {training.left_out()}"
    for name, text in lines.items():
        say(f"{name:<8} {text}")
    resumed = _notes_of_resuming(recipe, folder, trainer, state, machine) if state is not None else ()
    for text in [*notes_of_fitting, *notes(config), *resumed]:
        say(f"note: {text}")


def _notes_of_resuming(
    recipe: Recipe, folder: Path, trainer: Trainer, state: dict[str, Any], now: dict[str, Any]
) -> Iterator[str]:
    before = state["machine"]
    if before != now:
        changed = ", ".join(f"{before[name]} -> {now[name]} {name}" for name in now if before[name] != now[name])
        yield f"{changed}: the run goes on, but its results will not be bit-identical"
    if trainer.average and state["average"] is None:
        yield "the state has no averaged weights: their average begins with this part of the run"
    if (folder / RECIPE_FILE).exists():
        earlier = read_recipe(folder)
        if changed := changes(earlier, recipe):
            yield f"changed from here on: {', '.join(changed)}"
        yield from notes_of_more_steps(recipe.train, earlier.train, state["step"])


def _device_name(world: World) -> str:
    if world.device.type == "cuda":
        name = torch.cuda.get_device_name(world.device)
    else:
        name = f"{world.device.type}, {torch.get_num_threads()} threads"
    return f"{world.size} x {name}" if world.size > 1 else name
