"""A whole training run: data, model, trainer, and the folder of its results.

`runs/<name>/` holds `recipe.json`, `model.safetensors` (to use), `state.pt` (to continue from),
`log.jsonl`, `tensorboard/`, `batches.png`, and after the last step `metrics.json`, `curves.png`,
`detections.png` and the charts of `charts.CHARTS`; with evaluations on the way also `best.safetensors`,
the weights with the highest AP.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from doublehead.config import ModelConfig, Recipe, to_dict
from doublehead.data import build_loader
from doublehead.engine import banner, checkpoint, pictures
from doublehead.engine.batch_sheet import BATCHES_FILE, draw_first_batches
from doublehead.engine.best import BEST_FILE, Best
from doublehead.engine.coco_metrics import Details
from doublehead.engine.distributed import World
from doublehead.engine.errors import PeerFailed, PeerLostError, PeerStopped
from doublehead.engine.evaluator import evaluate_in_detail
from doublehead.engine.files import RECIPE_FILE, check_new, write_json
from doublehead.engine.fitting import Wishes, prepare
from doublehead.engine.lock import FolderLock
from doublehead.engine.logs import LOG_FILE, RunLog, check_log, read_log, say
from doublehead.engine.metrics_text import format_metrics
from doublehead.engine.optim import seed_step
from doublehead.engine.progress import Progress
from doublehead.engine.results import draw_results
from doublehead.engine.resume import (
    check_folder,
    check_state,
    how_to_go_on,
    identity,
    mark_saved,
    mark_unsaved,
    voc_classes,
)
from doublehead.engine.signals import Stopped, StopSignals
from doublehead.engine.starting import Source
from doublehead.engine.trainer import Hooks, Trainer, micro_batch_size
from doublehead.errors import UserError, config_errors

METRICS_FILE = "metrics.json"
_STOPS = (Stopped, KeyboardInterrupt, PeerStopped, PeerLostError)  # nothing is wrong with the run: it can be resumed


def train(
    recipe: Recipe, folder: Path, world: World, resume: bool = False, wishes: Wishes | None = None
) -> dict[str, Any]:
    """Train `recipe`, evaluate it, and leave everything in `folder`.

    Args:
        folder: the run's folder: an empty one (see `new_run_folder`), or with `resume` that of an earlier run.
        resume: continue from `folder`'s state, or begin again if it was stopped before its first one.
        wishes: what a new run may change in `recipe`, and what it starts from; None: nothing.

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
                parts.append(run := Run(recipe, folder, world, resume, wishes))
                run.trainer.fit()
                return run.finish()
        except BaseException as error:
            cause = _cause(error, world)
            if world.is_main and isinstance(cause, _STOPS):
                steps = (parts[0].trainer.step, parts[0].saved_step) if parts else None
                total = (parts[0].recipe if parts else recipe).train.steps
                if parts:
                    parts[0].progress.close()  # or the bar would be drawn again below
                tqdm.write(f"stopped{how_to_go_on(folder, steps, total)}", file=sys.stderr)
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


class Run(Hooks):
    """One run: its data, model and trainer, and the hooks that record it."""

    def __init__(
        self, recipe: Recipe, folder: Path, world: World, resume: bool = False, wishes: Wishes | None = None
    ) -> None:
        from doublehead.models import build_detector  # only here: it brings torchvision

        self.folder, self.world = folder, world
        self.saved_step: int | None = None  # the step of the state on disk
        prepared = prepare(recipe, world, wishes, voc_classes(folder, recipe) if resume else None)
        self.recipe, self.training, self.validation = prepared[:3]
        with config_errors():
            self._batches(0)  # refuses what a loader does
            state = self._read_state() if resume else None
            seed_step(self.recipe.train.seed, -1)  # the first weights, the same on every process
            model = build_detector(_start(self.recipe.model, state), len(self.training.classes) + 1)
            copied = None
            if prepared.source:
                copied = prepared.source.copy_to(model, self.recipe.model, self.training.classes)
            self.trainer = Trainer(model, self.recipe.train, self._batches, world, self)
        if state is not None:
            self.trainer.load_state_dict(state, folder / checkpoint.STATE_FILE)
            self.saved_step = state["step"]
        self.identity = identity(self.recipe, self.training)
        if world.is_main:
            banner.say_start(
                self.recipe, folder, world, self.training, self.trainer, state, self._machine(),
                data=prepared.said, start_from=copied, notes_of_fitting=prepared.notes,
            )  # fmt: skip
        self.log: RunLog | None = None  # the main process's
        self.best = Best(folder / BEST_FILE, self.validation)
        world.on_main(lambda: self._open_files(state, prepared.source))
        if prepared.source:
            self.on_save()  # a resume needs no more of the detector that it started from
        self.progress = Progress(self.recipe.train.steps, self.trainer.step, shown=world.is_main)
        self.metrics: dict[str, Any] = {}
        self.details: Details | None = None

    def _batches(self, start: int, training: Any = None, workers: int | None = None) -> Any:
        config = self.recipe.train
        return build_loader(
            self.training if training is None else training,
            micro_batch_size(config, self.world),
            train=True,
            seed=config.seed,
            rank=self.world.rank,
            world_size=self.world.size,
            workers=self.recipe.data.workers if workers is None else workers,
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

    def _open_files(self, state: dict[str, Any] | None, source: Source | None) -> None:
        check_log(self.folder)
        try:
            if state is None:  # before the recipe, by which a run is known
                mark_unsaved(self.folder, source.path if source else None)
            write_json(self.folder / RECIPE_FILE, to_dict(self.recipe))
            if state is not None:
                mark_saved(self.folder)
        except OSError as error:
            raise UserError(f"{self.folder / RECIPE_FILE}: cannot be written: {error.strerror}") from error
        self._draw_batches()
        if state is None:
            self.log = RunLog(self.folder)
            return

        def keep(record: dict[str, Any]) -> bool:
            return record["step"] <= state["step" if "loss" in record else "evaluated_step"]

        self.log = RunLog(self.folder, state["step"], keep)
        self.best.read()
        if not (self.folder / checkpoint.MODEL_FILE).exists():  # somebody removed it
            self._save_model()

    def _draw_batches(self) -> None:
        """Show the batches that this process begins with; not again when the run is resumed."""
        path, step = self.folder / BATCHES_FILE, self.trainer.step
        if path.exists() or step >= self.recipe.train.steps:
            return
        first = step * self.recipe.train.accumulate
        try:
            draw_first_batches(lambda training: self._batches(first, training, workers=0), self.training, path, first)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
        say(f"batches  the first ones: {path}")

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
            mark_saved(self.folder)

        self.world.on_main(write)

    def _save_model(self, name: str = checkpoint.MODEL_FILE, more: Mapping[str, str] | None = None) -> None:
        model, data, step = self.trainer.evaluated_model, self.training, self.trainer.step
        checkpoint.save_model(self.folder / name, model, self.recipe, data.classes, data.category_ids, step, more)

    def on_evaluate(self) -> None:
        data = self.recipe.data
        self.metrics, _, self.details = evaluate_in_detail(
            self.trainer.evaluated_model,
            self.validation,
            self.world,
            voc=self.validation.is_voc,
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
            names = self._write_files()
        except OSError as error:
            raise UserError(
                f"{self.folder}: the results cannot be written: {error.strerror or error}; the training is done and "
                "saved, --resume makes them again"
            ) from error
        say("\n" + format_metrics(self.metrics) + "\n")
        if best := self.best.describe():
            say(f"{self.folder}: {best}")
        say(f"{self.folder}: {', '.join([checkpoint.MODEL_FILE, LOG_FILE, *names])}")

    def _write_files(self) -> list[str]:
        """Write the results; their names."""
        steps = {"step": self.trainer.step, "seconds": round(self.trainer.seconds(), 1)}
        write_json(self.folder / METRICS_FILE, steps | self.metrics | self.best.as_metrics())
        pictures.draw_curves(read_log(self.folder / LOG_FILE), self.folder / "curves.png", self.recipe.name)
        model, device = self.trainer.evaluated_model, self.world.device
        drawn = draw_results(self.folder, self.recipe.name, model, self.validation, device, self.details)
        return [METRICS_FILE, "curves.png", *drawn]


def _start(config: ModelConfig, state: dict[str, Any] | None) -> ModelConfig:
    """The model to build: a resumed one needs no backbone file, as its state has all weights."""
    if state is None:
        return config
    return dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, weights=None))
