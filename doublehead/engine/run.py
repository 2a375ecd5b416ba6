"""A whole training run: data, model, trainer, and the folder that keeps what came of it.

`runs/<name>/` holds `recipe.json`, `model.safetensors` (to use), `state.pt` (to continue from),
`log.jsonl`, `tensorboard/`, and after the last step `metrics.json`, `curves.png` and
`detections.png`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from doublehead.config import Recipe, to_dict
from doublehead.data import build_dataset, build_loader
from doublehead.engine import checkpoint, pictures
from doublehead.engine.distributed import World
from doublehead.engine.errors import config_errors
from doublehead.engine.evaluator import evaluate, format_metrics, predict_images
from doublehead.engine.files import RECIPE_FILE, write_json
from doublehead.engine.logs import LOG_FILE, Progress, RunLog, read_log, say
from doublehead.engine.optim import seed_step
from doublehead.engine.trainer import Hooks, Trainer, check_config, micro_batch_size

METRICS_FILE = "metrics.json"
PICTURES = 8  # images in detections.png


def train(recipe: Recipe, folder: Path, world: World, resume: bool = False) -> dict[str, Any]:
    """Train `recipe`, evaluate it, and leave everything in `folder`.

    Args:
        folder: the run's folder, which exists (see `new_run_folder`).
        resume: continue from `folder`'s state, or begin again if it was stopped before its first one.

    Returns:
        The final metrics (see `evaluate`).

    Raises:
        UserError: the recipe cannot be built, or the folder cannot be written or read.
        DataError: the data cannot be used.
    """
    run = Run(recipe, folder, world, resume)
    run.trainer.fit()
    return run.finish()


class Run(Hooks):
    """The parts of one run, and the trainer's hooks that record it."""

    def __init__(self, recipe: Recipe, folder: Path, world: World, resume: bool = False) -> None:
        from doublehead.models import build_detector  # only here: it brings torchvision

        self.recipe, self.folder, self.world = recipe, folder, world
        with config_errors():
            check_config(recipe.train, world)  # before the data is read: that may take minutes
            self.training = build_dataset(recipe.data, "train", recipe.train.horizontal_flip)
            self.validation = build_dataset(recipe.data, "val", classes=self.training.classes)
            seed_step(recipe.train.seed, -1)  # the first weights, the same on every process
            model = build_detector(recipe.model, len(self.training.classes) + 1)
            self.trainer = Trainer(model, recipe.train, self._batches, world, self)
        state = self._restore() if resume else None
        if world.is_main:
            self._say_start(resumed=state is not None)
        self.log: RunLog | None = None  # the main process's
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
        )

    # ------------------------------------------------------------------ resuming

    def _restore(self) -> dict[str, Any] | None:
        path = self.folder / checkpoint.STATE_FILE
        if not path.exists():
            return None
        state = checkpoint.load_state(path)
        before, now = state["machine"], self._machine()
        if before != now and self.world.is_main:
            changed = ", ".join(f"{before[name]} -> {now[name]} {name}" for name in now if before[name] != now[name])
            say(f"note: {changed}: the run goes on, but not with the very bits it would have had")
        if self.trainer.average and state["average"] is None and self.world.is_main:
            say("note: the state has no averaged weights: their average begins with this part of the run")
        self.trainer.load_state_dict(state, path)
        return state

    def _open_files(self, state: dict[str, Any] | None) -> None:
        write_json(self.folder / RECIPE_FILE, to_dict(self.recipe))
        if state is None:
            self.log = RunLog(self.folder)
            return

        def keep(record: dict[str, Any]) -> bool:
            return record["step"] <= state["step" if "loss" in record else "evaluated_step"]

        self.log = RunLog(self.folder, state["step"], keep)

    def _machine(self) -> dict[str, Any]:
        """What sums are split over: their rounding depends on it, and so do a run's bits."""
        return {"processes": self.world.size, "threads": torch.get_num_threads(), "device": self.world.device.type}

    # ------------------------------------------------------------------ hooks

    def on_step(self) -> None:
        self.progress.advance()

    def on_log(self, record: dict[str, Any]) -> None:
        if self.log:
            self.log.write(record)
            self.progress.show(record)

    def on_save(self) -> None:
        state = self.trainer.state_dict() | {"machine": self._machine()}

        def write() -> None:
            # The model first: a state of the last step then proves that the model is of it too.
            path = self.folder / checkpoint.MODEL_FILE
            model, data = self.trainer.evaluated_model, self.training
            checkpoint.save_model(path, model, self.recipe, data.classes, data.category_ids, self.trainer.step)
            checkpoint.save_state(self.folder / checkpoint.STATE_FILE, state)

        self.world.on_main(write)

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
        if self.log and self.metrics.get("AP") is not None:
            numbers = {name: value for name, value in self.metrics.items() if name.startswith("A")}
            self.log.write({"step": self.trainer.step, **numbers})
            say(f"step {self.trainer.step}: AP {100 * numbers['AP']:.1f}, AP50 {100 * numbers['AP50']:.1f}")

    # ------------------------------------------------------------------ the end

    def finish(self) -> dict[str, Any]:
        """Close the log, draw the pictures, write and print the metrics."""
        self.progress.close()
        if self.log:
            self.log.close()
        self.world.on_main(self._write_results)
        return self.metrics

    def _write_results(self) -> None:
        steps = {"step": self.trainer.step, "seconds": round(self.trainer.seconds(), 1)}
        write_json(self.folder / METRICS_FILE, steps | self.metrics)
        pictures.draw_curves(read_log(self.folder / LOG_FILE), self.folder / "curves.png", self.recipe.name)
        self._draw_detections()
        say("\n" + format_metrics(self.metrics) + "\n")
        say(f"{self.folder}: {checkpoint.MODEL_FILE}, {METRICS_FILE}, {LOG_FILE}, curves.png, detections.png")

    def _draw_detections(self) -> None:
        count = min(PICTURES, len(self.validation))
        chosen = [i * len(self.validation) // count for i in range(count)]
        images, targets = zip(*(self.validation[i] for i in chosen), strict=True)
        outputs = predict_images(self.trainer.evaluated_model, images, self.world.device)
        sheet = pictures.detection_grid(images, targets, outputs, self.training.classes)
        pictures.save_picture(self.folder / "detections.png", sheet)

    def _say_start(self, resumed: bool) -> None:
        recipe, config, model = self.recipe, self.recipe.train, self.trainer.model
        weights = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        shown = ", ".join(self.training.classes[:8]) + (", ..." if len(self.training.classes) > 8 else "")
        options = [f"amp {config.amp}"] if config.amp != "off" else []
        options += [f"{config.accumulate} accumulation steps"] if config.accumulate > 1 else []
        options += [f"weights averaged ({config.ema_decay})"] if config.ema_decay is not None else []
        steps = f"{self.trainer.step} -> {config.steps}" if resumed else f"{config.steps}"
        lines = {
            "recipe": f"{recipe.name}: {recipe.about}",
            "data": f"{recipe.data.format}: {len(self.training)} images to train, {len(self.validation)} to validate",
            "classes": f"{len(self.training.classes)}: {shown}",
            "model": f"{recipe.model.head.kind}, {recipe.model.backbone.name}, "
            f"{weights / 1e6:.1f} M parameters, {trained / 1e6:.1f} M trained",
            "steps": ", ".join([f"{steps} x {config.batch_size} images", *options]),
            "device": _device_name(self.world),
            "folder": f"{self.folder}" + (" (resumed)" if resumed else ""),
        }
        for name, text in lines.items():
            say(f"{name:<8} {text}")


def _device_name(world: World) -> str:
    if world.device.type == "cuda":
        name = torch.cuda.get_device_name(world.device)
    else:
        name = f"{world.device.type}, {torch.get_num_threads()} threads"
    return f"{world.size} x {name}" if world.size > 1 else name
