"""A whole training run: data, model, trainer, and the folder of its results.

`runs/<name>/` holds `recipe.json`, `model.safetensors` (to use), `state.pt` (to continue from),
`log.jsonl`, `tensorboard/`, and after the last step `metrics.json`, `curves.png` and
`detections.png`; with evaluations on the way `best.safetensors`, those weights with the highest AP.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from doublehead.config import ModelConfig, Recipe, check, to_dict
from doublehead.data import build_dataset, build_loader
from doublehead.engine import checkpoint, pictures
from doublehead.engine.best import BEST_FILE, Best
from doublehead.engine.distributed import World
from doublehead.engine.errors import PeerFailed, PeerLostError, PeerStopped
from doublehead.engine.evaluator import evaluate, predict_images
from doublehead.engine.files import RECIPE_FILE, check_new, read_recipe, write_json
from doublehead.engine.lock import FolderLock
from doublehead.engine.logs import LOG_FILE, Progress, RunLog, check_log, read_log, say
from doublehead.engine.metrics_text import format_metrics
from doublehead.engine.optim import seed_step
from doublehead.engine.resume import changes, check_folder, check_state, identity, mark_unsaved, resume_command
from doublehead.engine.schedule import notes, notes_of_more_steps
from doublehead.engine.signals import Stopped, StopSignals
from doublehead.engine.trainer import Hooks, Trainer, check_config, micro_batch_size
from doublehead.errors import UserError, config_errors

METRICS_FILE = "metrics.json"
PICTURES = 8  # images in detections.png
_STOPS = (Stopped, KeyboardInterrupt, PeerStopped, PeerLostError)  # nothing is wrong with the run: it can be resumed


def train(recipe: Recipe, folder: Path, world: World, resume: bool = False) -> dict[str, Any]:
    """Train `recipe`, evaluate it, and leave everything in `folder`.

    Args:
        folder: the run's folder: an empty one (see `new_run_folder`), or with `resume` that of an earlier run.
        resume: continue from `folder`'s state, or begin again if it was stopped before its first one.

    Returns:
        The final metrics (see `evaluate`).

    Raises:
        UserError: the recipe cannot be built, the folder cannot be written or read, another process trains in it, or
            it holds another run.  Then nothing in it has changed.
        DataError: the data cannot be used.
        Stopped: after SIGTERM or Ctrl-C.
    """
    parts: list[Run] = []
    with StopSignals() as signals:  # also while an error is handled: torchrun sends SIGTERM as soon as one process died
        try:
            with signals.ending_at_once(), _locked(folder, world):
                world.on_main(lambda: check_folder(folder, recipe) if resume else check_new(folder))
                parts.append(run := Run(recipe, folder, world, resume))
                run.trainer.fit()
                return run.finish()
        except BaseException as error:
            cause = _cause(error, world)
            if world.is_main and isinstance(cause, _STOPS):
                steps = (parts[0].trainer.step, parts[0].saved_step) if parts else None
                tqdm.write(f"stopped{_progress(folder, steps, recipe.train.steps)}", file=sys.stderr)
            if cause is error:
                raise
            raise cause from None


@contextlib.contextmanager
def _locked(folder: Path, world: World) -> Iterator[None]:
    """Inside, no other process trains in `folder`."""
    lock = FolderLock(folder)
    try:
        missing = world.on_main(lock.acquire)
        if missing and world.is_main:
            say(f"note: {folder}: no file lock ({missing}): see to it that no second training uses this folder")
        yield
    finally:
        lock.release()


def _cause(error: BaseException, world: World) -> BaseException:
    """The exception to end with: `error`, unless another process's end is its cause."""
    try:
        world.give_way(error)
    except (PeerFailed, PeerLostError) as other:
        return other
    return error


def _progress(folder: Path, steps: tuple[int, int | None] | None, total: int) -> str:
    """What a stopped run has saved, and how to resume it.  `steps`: done and saved; None: it had not begun."""
    command = resume_command(folder, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if not (folder / RECIPE_FILE).exists():
        return " before the first step: nothing is saved; start it again with the same command"
    if steps is None:
        return f" before the first step: {folder} is as it was; go on with: {command}"
    done, saved = steps
    if saved is None:
        return f" before the first checkpoint: nothing is saved yet; begin again with: {command}"
    what = f"step {saved} of {total}" if saved < total else f"the last step, {total},"
    return f" after step {done}: {what} is saved in {folder}; go on with: {command}"


class Run(Hooks):
    """One run: its data, model and trainer, and the hooks that record it."""

    def __init__(self, recipe: Recipe, folder: Path, world: World, resume: bool = False) -> None:
        from doublehead.models import build_detector  # only here: it brings torchvision

        self.recipe, self.folder, self.world = recipe, folder, world
        self.saved_step: int | None = None  # the step of the state on disk
        with config_errors():
            check(recipe)  # before the data is read: that may take minutes
            check_config(recipe.train, world)
            self.training = build_dataset(recipe.data, "train", recipe.train.horizontal_flip)
            self.validation = build_dataset(recipe.data, "val", classes=self.training.classes)
            self._batches(0)  # refuses what a loader does
            state = self._read_state() if resume else None
            seed_step(recipe.train.seed, -1)  # the first weights, the same on every process
            model = build_detector(_start(recipe.model, state), len(self.training.classes) + 1)
            self.trainer = Trainer(model, recipe.train, self._batches, world, self)
        if state is not None:
            self.trainer.load_state_dict(state, folder / checkpoint.STATE_FILE)
            self.saved_step = state["step"]
        self.identity = identity(recipe, self.training)
        if world.is_main:
            self._say_start(state)
        self.log: RunLog | None = None  # the main process's
        self.best = Best(folder / BEST_FILE, self.validation)
        world.on_main(lambda: self._open_files(state))
        self.progress = Progress(recipe.train.steps, self.trainer.step, shown=world.is_main)
        self.metrics: dict[str, Any] = {}

    def _batches(self, start: int) -> Any:
        config = self.recipe.train
        return build_loader(
            self.training,
            micro_batch_size(config, self.world),
            train=True,
            seed=config.seed,
            rank=self.world.rank,
            world_size=self.world.size,
            workers=self.recipe.data.workers,
            aspect_ratio_grouping=config.aspect_ratio_grouping,
            start_step=start,
            augment=config.augment,
        )

    # ------------------------------------------------------------------ resuming

    def _read_state(self) -> dict[str, Any] | None:
        """This run's state to continue from; None if it was stopped before its first one."""
        path = self.folder / checkpoint.STATE_FILE
        if not path.exists():
            return None
        state = checkpoint.load_state(path)
        check_state(self.folder, state, self.recipe, self.training)
        return state

    def _open_files(self, state: dict[str, Any] | None) -> None:
        check_log(self.folder)
        try:
            write_json(self.folder / RECIPE_FILE, to_dict(self.recipe))
            mark_unsaved(self.folder, state is None)
        except OSError as error:
            raise UserError(f"{self.folder / RECIPE_FILE}: cannot be written: {error.strerror}") from error
        if state is None:
            self.log = RunLog(self.folder)
            return

        def keep(record: dict[str, Any]) -> bool:
            return record["step"] <= state["step" if "loss" in record else "evaluated_step"]

        self.log = RunLog(self.folder, state["step"], keep)
        self.best.read()
        if not (self.folder / checkpoint.MODEL_FILE).exists():  # somebody removed it
            self._save_model()

    def _machine(self) -> dict[str, Any]:
        """What sums are split over: rounding depends on it, and so do the exact results of a run."""
        return {"processes": self.world.size, "threads": torch.get_num_threads(), "device": self.world.device.type}

    # ------------------------------------------------------------------ hooks

    def on_step(self) -> None:
        self.progress.advance()

    def on_log(self, record: dict[str, Any]) -> None:
        if self.log:
            self.log.write(record)
            self.progress.show(record)

    def on_save(self) -> None:
        state = self.trainer.state_dict() | {"machine": self._machine(), "run": self.identity}
        path = self.folder / checkpoint.STATE_FILE

        def write() -> None:
            # The model first: a state of the last step then proves that the model was saved as well.
            self._save_model()
            checkpoint.save_state(path, state)
            self.saved_step = state["step"]
            mark_unsaved(self.folder, False)

        self.world.on_main(write)

    def _save_model(self, name: str = checkpoint.MODEL_FILE, more: Mapping[str, str] | None = None) -> None:
        model, data, step = self.trainer.evaluated_model, self.training, self.trainer.step
        checkpoint.save_model(self.folder / name, model, self.recipe, data.classes, data.category_ids, step, more)

    def on_evaluate(self) -> None:
        data = self.recipe.data
        self.metrics, _ = evaluate(
            self.trainer.evaluated_model,
            self.validation,
            self.world,
            voc=data.format == "voc",
            workers=data.workers,
            progress=self.world.is_main,
        )
        self.world.on_main(self._keep_best)
        if self.log and self.metrics.get("AP") is not None:
            numbers = {name: value for name, value in self.metrics.items() if name.startswith("A")}
            self.log.write({"step": self.trainer.step, **numbers})
            say(f"step {self.trainer.step}: AP {100 * numbers['AP']:.1f}, AP50 {100 * numbers['AP50']:.1f}")

    def _keep_best(self) -> None:
        """Before the log says so: a run killed between the two evaluates again, and finds its own file."""
        ap = self.metrics.get("AP")
        if self.recipe.train.eval_every and self.best.is_beaten_by(self.trainer.step, ap):
            self._save_model(BEST_FILE, self.best.replaced_by(self.trainer.step, ap))

    # ------------------------------------------------------------------ the end

    def finish(self) -> dict[str, Any]:
        """Close the log, draw the pictures, write and print the metrics."""
        self.progress.close()
        if self.log:
            self.log.close()
        self.world.on_main(self._write_results)
        return self.metrics

    def _write_results(self) -> None:
        try:
            self._write_files()
        except OSError as error:
            raise UserError(
                f"{self.folder}: the results cannot be written: {error.strerror or error}; the training is done and "
                "saved, --resume makes them again"
            ) from error
        say("\n" + format_metrics(self.metrics) + "\n")
        if best := self.best.describe():
            say(f"{self.folder}: {best}")
        say(f"{self.folder}: {checkpoint.MODEL_FILE}, {METRICS_FILE}, {LOG_FILE}, curves.png, detections.png")

    def _write_files(self) -> None:
        steps = {"step": self.trainer.step, "seconds": round(self.trainer.seconds(), 1)}
        write_json(self.folder / METRICS_FILE, steps | self.metrics | self.best.as_metrics())
        pictures.draw_curves(read_log(self.folder / LOG_FILE), self.folder / "curves.png", self.recipe.name)
        self._draw_detections()

    def _draw_detections(self) -> None:
        count = min(PICTURES, len(self.validation))
        chosen = [i * len(self.validation) // count for i in range(count)]
        images, targets = zip(*(self.validation[i] for i in chosen), strict=True)
        outputs = predict_images(self.trainer.evaluated_model, images, self.world.device)
        sheet = pictures.detection_grid(images, targets, outputs, self.training.classes)
        pictures.save_picture(self.folder / "detections.png", sheet)

    def _say_start(self, state: dict[str, Any] | None) -> None:
        """Print what is trained, on what data and device, and notes.  Nothing is written yet."""
        recipe, config, model = self.recipe, self.recipe.train, self.trainer.model
        weights = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        shown = ", ".join(self.training.classes[:8]) + (", ..." if len(self.training.classes) > 8 else "")
        options = [f"amp {config.amp}"] if config.amp != "off" else []
        options += [f"{config.accumulate} accumulation steps"] if config.accumulate > 1 else []
        options += [f"weights averaged ({config.ema_decay})"] if config.ema_decay is not None else []
        options += ["all done: the results are made again"] if self.trainer.step >= config.steps else []
        steps = f"{config.steps}" if state is None else f"{self.trainer.step} -> {config.steps}"
        lines = {
            "recipe": f"{recipe.name}: {recipe.about}",
            "data": f"{recipe.data.format}: {len(self.training)} images to train, {len(self.validation)} to validate",
            "classes": f"{len(self.training.classes)}: {shown}",
            "model": f"{recipe.model.head.kind}, {recipe.model.backbone.name}, "
            f"{weights / 1e6:.1f} M parameters, {trained / 1e6:.1f} M trained",
            "steps": ", ".join([f"{steps} x {config.batch_size} images", *options]),
            "device": _device_name(self.world),
            "folder": f"{self.folder}" + (" (resumed)" if state is not None else ""),
        }
        if self.training.left_out():
            lines["left out"] = f"of training: {self.training.left_out()}"
        for name, text in lines.items():
            say(f"{name:<8} {text}")
        for text in [*notes(config), *(self._notes_of_resuming(state) if state is not None else ())]:
            say(f"note: {text}")

    def _notes_of_resuming(self, state: dict[str, Any]) -> Iterator[str]:
        before, now = state["machine"], self._machine()
        if before != now:
            changed = ", ".join(f"{before[name]} -> {now[name]} {name}" for name in now if before[name] != now[name])
            yield f"{changed}: the run goes on, but its results will not be bit-identical"
        if self.trainer.average and state["average"] is None:
            yield "the state has no averaged weights: their average begins with this part of the run"
        if (self.folder / RECIPE_FILE).exists():
            recipe = read_recipe(self.folder)
            if changed := changes(recipe, self.recipe):
                yield f"changed from here on: {', '.join(changed)}"
            yield from notes_of_more_steps(self.recipe.train, recipe.train, state["step"])


def _start(config: ModelConfig, state: dict[str, Any] | None) -> ModelConfig:
    """The model to build: a resumed one needs no backbone file, as its state has all weights."""
    if state is None:
        return config
    return dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, weights=None))


def _device_name(world: World) -> str:
    if world.device.type == "cuda":
        name = torch.cuda.get_device_name(world.device)
    else:
        name = f"{world.device.type}, {torch.get_num_threads()} threads"
    return f"{world.size} x {name}" if world.size > 1 else name
