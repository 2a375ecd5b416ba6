"""The training loop: reproducible, interruptible, the same on one process and on many.

A run is a chain of optimizer steps.  Everything a step uses follows from the state after the step
before it and from (seed, step, rank): the batch, by the loader's contract, and every random number
the model draws, by `seed_step`.  So a run that is killed and resumed from its last checkpoint
repeats the lost steps exactly: on the CPU, with as many processes and threads, it ends with the
same bits.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from doublehead.config import TrainConfig, check
from doublehead.engine.distributed import World
from doublehead.engine.errors import NonFiniteLossError
from doublehead.engine.optim import (
    WeightAverage,
    build_optimizer,
    learning_rate,
    seed_step,
    set_learning_rate,
)
from doublehead.engine.schema import is_finite
from doublehead.engine.signals import Stopped, StopSignals, say_saving
from doublehead.engine.state import trainer_state
from doublehead.engine.tracker import LossTracker
from doublehead.errors import UserError

AMP_TYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Hooks:
    """Callbacks of a trainer, called on every process; these do nothing."""

    def on_step(self) -> None:
        """After each optimizer step."""

    def on_log(self, record: dict[str, Any]) -> None:
        """Each `log_every` steps: step, lr, mean losses, images_per_second, time."""

    def on_save(self) -> None:
        """Store `Trainer.state_dict()`."""

    def on_evaluate(self) -> None:
        """Measure `Trainer.evaluated_model`."""


class Trainer:
    """Trains `model` in place.

    Args:
        model: a detector on `world.device`; in training `model(images, targets)` gives weighted scalar losses.
        config: the optimisation.
        batches: `batches(start)` yields (images, targets) with `micro_batch_size(config, world)` images
            each, without end, beginning with micro-batch `start` of the run.
        world: the processes.
        hooks: callbacks.

    Raises:
        ValueError: a field of `config` is out of range, or `batch_size` cannot be divided.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        batches: Callable[[int], Iterable],
        world: World | None = None,
        hooks: Hooks | None = None,
    ) -> None:
        self.world = world or World()
        check_config(config, self.world)
        self.config, self.batches, self.hooks = config, batches, hooks or Hooks()
        self.model = _prepared(model, config, self.world)
        self.average = WeightAverage(self.model, config.ema_decay) if config.ema_decay is not None else None
        self.optimizer = build_optimizer(self.model, config)
        self.amp_type = AMP_TYPES[config.amp]
        self.scaler = torch.amp.GradScaler(self.world.device.type, enabled=config.amp == "fp16")
        self.parallel = _parallel(self.model, self.world)
        self.losses = LossTracker(self.world)
        self.signals = StopSignals(say_saving) if self.world.is_main else StopSignals()
        self.step = 0  # optimizer steps done
        self.evaluated_step = -1  # the step of the last evaluation
        self.earlier_seconds = 0.0  # of this run, before it was resumed
        self._begun = time.monotonic()

    @property
    def evaluated_model(self) -> nn.Module:
        """The model to evaluate and save: the averaged weights where averaging is on."""
        return self.average.model if self.average else self.model

    def fit(self) -> None:
        """Train until `config.steps`, evaluating and saving on the way and at the end.

        Raises:
            NonFiniteLossError: a loss became NaN or infinite, or the weights that were to be saved; nothing is
                saved after that (see `LossTracker` for when it is noticed).
            Stopped: after SIGTERM or Ctrl-C, when the running step is done and saved.
        """
        self._begun = self._logged_at = time.monotonic()
        self._logged_step = self.step
        self.model.train()
        batches = iter(self.batches(self.step * self.config.accumulate))
        with self.signals:
            while True:
                if self._due(self.config.eval_every) and self.evaluated_step < self.step:
                    self._evaluate()
                if self.step >= self.config.steps:
                    break
                self._optimize(batches)
                self._after_step()

    def _optimize(self, batches: Iterator) -> None:
        """One optimizer step over `accumulate` micro-batches."""
        micro_batches = [next(batches) for _ in range(self.config.accumulate)]
        seed_step(self.config.seed, self.step, self.world.rank)
        set_learning_rate(self.optimizer, learning_rate(self.step, self.config))
        self.optimizer.zero_grad(set_to_none=True)
        totals: dict[str, torch.Tensor] = {}
        for number, (images, targets) in enumerate(micro_batches, start=1):
            losses = self._forward_backward(images, targets, last=number == len(micro_batches))
            totals = {name: totals.get(name, 0) + value for name, value in losses.items()}
        image_ids = [int(target["image_id"]) for _, targets in micro_batches for target in targets]
        self.losses.note(self.step, totals, image_ids)
        self._update_weights()
        self.step += 1

    def _forward_backward(self, images: list, targets: list, last: bool) -> dict[str, torch.Tensor]:
        device = self.world.device
        images = [image.to(device, non_blocking=True) for image in images]
        targets = [{name: _to(value, device) for name, value in target.items()} for target in targets]
        # Gradients cross between the processes once, with the last micro-batch.
        local = self.world.size > 1 and not last
        with self.parallel.no_sync() if local else contextlib.nullcontext():
            with torch.autocast(device.type, dtype=self.amp_type, enabled=self.amp_type is not None):
                losses = self._losses(images, targets)
            losses = {name: value / self.config.accumulate for name, value in losses.items()}
            self.scaler.scale(sum(losses.values())).backward()
        return {name: value.detach().float() for name, value in losses.items()}

    def _losses(self, images: list, targets: list) -> dict[str, torch.Tensor]:
        try:
            return self.parallel(images, targets)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            side = max(max(image.shape[-2:]) for image in images)
            raise UserError(
                f"{len(images)} picture at a time of up to {side} pixels is too little for a batch norm in training, "
                "which needs more than one value per channel: give a larger --train.batch-size (per process and "
                "accumulation step), larger pictures, or --model.backbone.norm group_norm"
            ) from error

    def _update_weights(self) -> None:
        if self.config.clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average:
            self.average.update(self.model)

    def _after_step(self) -> None:
        self.hooks.on_step()
        if self._due(self.config.log_every):
            self._log()
        stopping = self.world.any(bool(self.signals.received))
        # Saved before evaluating too, so that a stop during a long evaluation loses nothing.
        if stopping or self._due(self.config.checkpoint_every) or self._due(self.config.eval_every):
            self.losses.check()
            self._check_weights()
            self.hooks.on_save()
        if stopping:
            raise Stopped(self.signals.received)

    def _check_weights(self) -> None:
        """A finite loss can have gradients that are not: the last good checkpoint must not give way to such weights."""
        wrong = [name for name, tensor in self.evaluated_model.state_dict().items() if not is_finite(tensor)]
        if self.world.any(bool(wrong)):
            raise NonFiniteLossError(
                f"the weights are not finite after step {self.step}: NaN or infinity in {len(wrong)} tensors "
                f"({', '.join(wrong[:3])}); they are not saved. Try a lower --train.lr, a longer --train.warmup-steps "
                "or --train.clip-grad-norm 10"
            )

    def _due(self, every: int) -> bool:
        """Whether something done each `every` steps (0: only at the end) is to be done after this step."""
        return self.step >= self.config.steps or (every > 0 and self.step > 0 and self.step % every == 0)

    def _log(self) -> None:
        self.losses.check()
        means = self.losses.take_means()
        now = time.monotonic()
        images = (self.step - self._logged_step) * self.config.batch_size
        speed = images / max(now - self._logged_at, 1e-9)
        self._logged_at, self._logged_step = now, self.step
        record = {"step": self.step, "lr": learning_rate(self.step - 1, self.config), "loss": sum(means.values())}
        record |= means | {"images_per_second": round(speed, 3), "time": round(self.seconds(), 3)}
        self.hooks.on_log(record)

    def _evaluate(self) -> None:
        begun = time.monotonic()
        with self.signals.ending_at_once():
            self.world.share_buffers(self.evaluated_model)
            self.hooks.on_evaluate()
        self.evaluated_step = self.step
        self._logged_at += time.monotonic() - begun  # images per second are those of training alone

    def seconds(self) -> float:
        """How long the run has been going, the earlier parts of a resumed one included."""
        return self.earlier_seconds + time.monotonic() - self._begun

    def state_dict(self) -> dict[str, Any]:
        """Everything the coming steps depend on, as tensors and plain values; call it on every process."""
        return {
            "step": self.step,
            "evaluated_step": self.evaluated_step,
            "seconds": self.seconds(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "losses": self.losses.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], source: str | Path = "the training state") -> None:
        """Continue from what `state_dict` gave; `source` is its name in messages.

        If the state has no averaged weights, averaging starts from its weights; if averaging is off now, the state's
        averaged weights are dropped.

        Raises:
            UserError: the state is incomplete or damaged, or belongs to another model or optimiser; nothing of it
                was taken.
        """
        try:
            trainer_state(self)(state)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if state["scaler"]:  # empty unless amp was fp16
                self.scaler.load_state_dict(state["scaler"])
            if self.average and state["average"] is not None:
                self.average.load_state_dict(state["average"])
            elif self.average:  # averaging begins with this part of the run
                self.average.model.load_state_dict(state["model"])
            self.losses.load_state_dict(state["losses"])
        except (RuntimeError, ValueError, KeyError) as error:  # PyTorch's own, and those of `trainer_state`
            raise UserError(f"{source} does not fit this recipe: {error}") from error
        self.step, self.evaluated_step = state["step"], state["evaluated_step"]
        self.earlier_seconds = state["seconds"]


def check_config(config: TrainConfig, world: World) -> None:
    """Check the values of `config`, and that these processes can train with it.

    Raises:
        ValueError: names the field, its value and what is accepted.
    """
    check(config, "train")
    if config.sync_batch_norm and world.size > 1 and world.device.type != "cuda":
        raise ValueError("train.sync_batch_norm needs CUDA: PyTorch has no synchronised batch norm for the CPU")
    micro_batch_size(config, world)


def micro_batch_size(config: TrainConfig, world: World) -> int:
    """Images per process and forward pass: `batch_size / (processes * accumulate)`.

    Raises:
        ValueError: that is no whole number.
    """
    parts = world.size * config.accumulate
    if config.batch_size % parts:
        raise ValueError(
            f"train.batch_size {config.batch_size} images cannot be shared by {world.size} processes "
            f"x {config.accumulate} accumulation steps: give a multiple of {parts}"
        )
    return config.batch_size // parts


def _prepared(model: nn.Module, config: TrainConfig, world: World) -> nn.Module:
    if config.sync_batch_norm and world.size > 1:  # over one process it is plain batch norm
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model.to(world.device)


def _parallel(model: nn.Module, world: World) -> nn.Module:
    if world.size == 1:
        return model
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dim() == 4 and parameter.is_contiguous():
            parameter.register_hook(functools.partial(_with_strides, parameter.stride()))
    devices = [world.device] if world.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=devices)


def _with_strides(strides: tuple[int, ...], gradient: torch.Tensor) -> torch.Tensor:
    """The gradient of a 1x1 kernel, seen with the kernel's own strides.

    Its memory is contiguous and channels last at once, and operators differ in which of the two they say.  DDP takes
    the difference for another layout, and warns.
    """
    if gradient.stride() == strides or not gradient.is_contiguous():
        return gradient
    return gradient.as_strided(gradient.shape, strides)


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
