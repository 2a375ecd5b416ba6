"""Checks that a resumed run continues the stopped one, all made before anything in the folder changes."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors

from doublehead.config import Recipe, to_dict
from doublehead.data.voc import VOC_CLASSES
from doublehead.engine.checkpoint import MODEL_FILE, STATE_FILE
from doublehead.engine.commands import train_again_command
from doublehead.engine.files import RECIPE_FILE, UNSAVED_MARK, read_recipe
from doublehead.errors import UserError

#: Fields that may change when a run is resumed.  The others shaped the state (the model, the optimiser and its
#: settings), or decide the order of the images (seed, batch size, data).
MAY_CHANGE = (
    "name", "about", "model.backbone.weights", "model.head.fused", "model.head.recompute", "model.detection",
    "data.root", "data.val_split", "data.val_images", "data.workers",
    "data.on_bad_record", "data.max_skipped", "data.max_pixels", "data.outside_root",  # which images: see `check_state`
    "train.steps", "train.accumulate", "train.lr", "train.milestones", "train.gamma", "train.warmup_steps",
    "train.warmup_factor", "train.clip_grad_norm", "train.amp", "train.ema_decay", "train.sync_batch_norm",
    "train.channels_last", "train.horizontal_flip", "train.augment", "train.epochs", "train.schedule",
    "train.eval_every", "train.checkpoint_every", "train.log_every", "train.device",
)  # fmt: skip


#: The best weights by AP so far (see `train.eval_every`).
BEST_FILE = "best.safetensors"
_RESULTS = (MODEL_FILE, BEST_FILE, "metrics.json", "curves.png", "detections.png", "pr_curves.png", "confusion.png")


def mark_unsaved(folder: Path, start_from: Path | None = None) -> None:
    """Note that the run in `folder` has no state yet, and from which detector it starts, if from any."""
    (folder / UNSAVED_MARK).write_text("" if start_from is None else f"{start_from}\n", encoding="utf-8")


def mark_saved(folder: Path) -> None:
    """Note that the run in `folder` has a state."""
    (folder / UNSAVED_MARK).unlink(missing_ok=True)


def resume_command(folder: str | Path, processes: int = 1) -> str:
    """The command that resumes the run in `folder`."""
    start = "" if processes == 1 else f"torchrun --nproc-per-node {processes} -m "
    return f"{start}doublehead train --resume {shlex.quote(str(folder))}"


def how_to_go_on(folder: Path, steps: tuple[int, int | None] | None, total: int) -> str:
    """What a stopped run has saved, and how to resume it.  `steps`: done and saved; None: it had not begun."""
    command = resume_command(folder, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if not (folder / RECIPE_FILE).exists():
        return " before the first step: nothing is saved; start it again with the same command"
    if steps is None:
        return f" before the first step: {folder} is as it was; go on with: {command}"
    done, saved = steps
    if saved is None:
        return f" at {done}/{total} before the first checkpoint: nothing is saved yet; begin again with: {command}"
    if saved == total:
        return f" at {done}/{total}: all steps are saved; measure the model with: {command}"
    unsaved = f", saved at {saved}" if saved < done else ""
    return f" at {done}/{total}{unsaved}; go on with: {command}"


def identity(recipe: Recipe, dataset: Any) -> dict[str, Any]:
    """What a training state stores to recognise its run: plain values."""
    return {
        "recipe": _fixed(recipe),
        "classes": list(dataset.classes),
        "images": len(dataset),
        "files": digest_of_images(dataset),
    }


def digest_of_images(dataset: Any) -> str:
    """Of the images' names and sizes, in order."""
    files = "".join(f"{name}\n{size}\n" for name, size in zip(dataset.file_names, dataset.image_sizes, strict=True))
    return hashlib.sha256(files.encode("utf-8", "surrogateescape")).hexdigest()


def check_folder(folder: Path, recipe: Recipe) -> None:
    """Refuse a folder without a training to resume, or with one of another recipe.

    A run that was stopped before its first state begins again.

    Raises:
        UserError: says what to do instead.
    """
    mark = folder / UNSAVED_MARK
    if not (folder / STATE_FILE).exists():
        if not mark.exists():
            _refuse_results(folder, recipe)
        elif source := mark.read_text(encoding="utf-8").strip():
            raise UserError(
                f"{folder} was stopped before it had saved the weights that it started from: remove it, and start it "
                f"again from {source}: {train_again_command(folder, recipe, Path(source))}"
            )
    if (folder / RECIPE_FILE).exists():
        check_recipe(folder, _fixed(read_recipe(folder)), recipe)


def _refuse_results(folder: Path, recipe: Recipe) -> None:
    """Refuse a folder that has results though it has no state: a model that somebody keeps, or converted."""
    there = [name for name in _RESULTS if (folder / name).exists()]
    if there:
        model = {MODEL_FILE: folder, BEST_FILE: folder / BEST_FILE}.get(there[0])
        another = "begin another run from its weights" if model else "begin another run"
        raise UserError(
            f"{folder} has {there[0]} but no {STATE_FILE} to go on from, and --resume never overwrites it; "
            f"{another}: {train_again_command(folder, recipe, model)}"
        )


def check_recipe(folder: Path, before: dict[str, Any], recipe: Recipe) -> None:
    """Refuse a recipe that differs from the run's in a field that must not change.

    Args:
        before: fields of the run's recipe, by name.

    Raises:
        UserError: names the fields.
    """
    now = _fixed(recipe)
    differing = [name for name in now if before.get(name, now[name]) != now[name]]
    changed = [f"{name} is {before[name]} there, not {now[name]}" for name in differing]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"{folder} holds another run: {', '.join(changed[:3])}{more}; resume it without these options, "
            f"or begin another from its weights: {train_again_command(folder, recipe, folder)}"
        )


def changes(before: Recipe, now: Recipe) -> list[str]:
    """Differences between two parts of one run: `train.lr 0.01 -> 0.001`."""
    old, new = (dict(_flat("", to_dict(recipe))) for recipe in (before, now))
    return [f"{name} {old[name]} -> {value}" for name, value in new.items() if old[name] != value]


def check_state(folder: Path, state: dict[str, Any], recipe: Recipe, dataset: Any) -> None:
    """Refuse a state of another recipe or other data, of more steps than `recipe` has, or to measure on other images.

    Raises:
        UserError: names what differs.
    """
    known = state.get("run")  # states of earlier versions have none
    if known is None:
        known = {"recipe": {}, "classes": _classes_of_model(folder / MODEL_FILE) or dataset.classes}
    check_recipe(folder, known["recipe"], recipe)
    if difference := _class_difference(known["classes"], dataset.classes):
        raise UserError(
            f"{folder} was trained on other classes: {difference}; the same names in the same order are needed: "
            f"resume on the run's own data, or begin another run: {train_again_command(folder, recipe, folder)}"
        )
    now = identity(recipe, dataset)
    if known.get("files", now["files"]) != now["files"]:
        raise UserError(
            f"{folder} was trained on other images: {known['images']} then, {now['images']} now, and not with the same "
            "names, sizes and order; resume on the run's own data, or begin another run: "
            f"{train_again_command(folder, recipe, folder)}"
        )
    if recipe.train.steps < state["step"]:
        raise UserError(
            f"{folder} has done {state['step']} steps already, more than train.steps {recipe.train.steps}: "
            f"give --train.steps {state['step']} or more, or begin another run from its weights: "
            f"{train_again_command(folder, recipe, folder)}"
        )
    if recipe.train.steps == state["step"] and (folder / "metrics.json").exists():
        _check_validation(folder, recipe)


def _check_validation(folder: Path, recipe: Recipe) -> None:
    """Refuse other validation images for a finished run: its metrics would be overwritten by those of other images.

    Raises:
        UserError: names the fields, and the command that measures without writing into the folder.
    """
    if not (folder / RECIPE_FILE).exists():
        return
    names = ("data.val_split", "data.val_images")
    changed = [text for text in changes(read_recipe(folder), recipe) if text.startswith(names)]
    if changed:
        options = {"--data.val-split": recipe.data.val_split, "--data.val-images": recipe.data.val_images}
        given = " ".join(f"{name} {shlex.quote(str(value))}" for name, value in options.items() if value is not None)
        raise UserError(
            f"{folder} is finished, and its results are those of its own validation images ({', '.join(changed)}); "
            f"measure it on others: doublehead evaluate {shlex.quote(str(folder))} {given}"
        )


def _fixed(recipe: Recipe) -> dict[str, Any]:
    """The fields that must not change, by name; lists, as JSON has no tuples."""
    fields = _flat("", json.loads(json.dumps(to_dict(recipe))))
    return {name: value for name, value in fields if not any(f"{name}.".startswith(f"{free}.") for free in MAY_CHANGE)}


def _flat(prefix: str, values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}", value


def voc_classes(folder: Path, recipe: Recipe) -> list[str] | None:
    """VOC's twenty classes if the run in `folder` learns them all; None: its data's own.

    Earlier versions took all of them for data in VOC's layout that name only some.
    """
    if recipe.data.format != "voc" or recipe.data.classes is not None:
        return None
    return list(VOC_CLASSES) if _classes_of_model(folder / MODEL_FILE) == list(VOC_CLASSES) else None


def _classes_of_model(path: Path) -> list[str] | None:
    """The classes in the description of the model beside a state; None if there is no model, or no description."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            classes = json.loads((file.metadata() or {})["classes"])
    except (OSError, KeyError, ValueError, safetensors.SafetensorError):
        return None
    return classes if isinstance(classes, list) else None


def _class_difference(before: Sequence[str], now: Sequence[str]) -> str | None:
    for number, (one, other) in enumerate(zip(before, now, strict=False), start=1):
        if one != other:
            return f"class {number} is {one!r} there and {other!r} in the data"
    return f"{len(before)} there, {len(now)} in the data" if len(before) != len(now) else None
