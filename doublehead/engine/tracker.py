"""Losses of a training: their means for the log, and the check for NaN and infinity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from doublehead.engine.distributed import World
from doublehead.engine.errors import NonFiniteLossError

_MOST_PENDING = 50


@dataclass
class _StepLosses:
    """One step's losses, still on the device, and the images they came from."""

    step: int
    image_ids: list[int]
    names: list[str]
    values: torch.Tensor


class LossTracker:
    """Notes each step's losses without waiting for the device.

    On the CPU every step is checked before its optimizer step.  On CUDA several steps are checked
    together: before each log record and each save, and at least every 50 steps.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._sums: dict[str, torch.Tensor] = {}  # since the last `take_means`
        self._steps = 0
        self._pending: list[_StepLosses] = []  # not yet known to be finite

    def note(self, step: int, losses: dict[str, torch.Tensor], image_ids: list[int]) -> None:
        """Note the losses (detached scalars, the same names each time) of step `step`.

        Raises:
            NonFiniteLossError: see `check`.
        """
        for name, value in losses.items():
            # In float64 a few float32 values add up exactly, in any order: a resumed run logs the same means.
            self._sums[name] = self._sums.get(name, 0) + value.double()
        self._steps += 1
        self._pending.append(_StepLosses(step, image_ids, list(losses), torch.stack(list(losses.values()))))
        if self._world.device.type == "cpu" or len(self._pending) >= _MOST_PENDING:
            self.check()

    def check(self) -> None:
        """Check the losses noted since the last check; waits for the device.

        Raises:
            NonFiniteLossError: on every process, when any of them met NaN or infinity.
        """
        pending, self._pending = self._pending, []
        report = _first_bad(pending)
        if not self._world.any(report is not None):
            return
        reports = [report for report in self._world.gather(report) if report]
        step = min(report[0] for report in reports)  # later ones, on other processes too, follow from it
        first = [report for report in reports if report[0] == step]
        raise NonFiniteLossError(
            f"the loss is not finite at step {step + 1}: {'; '.join(report[1] for report in first)}; "
            f"images with ids {sorted(i for report in first for i in report[2])}. "
            "Look at these images' boxes, or try a lower --train.lr, a longer --train.warmup-steps "
            "or --train.clip-grad-norm 10"
        )

    def take_means(self) -> dict[str, float]:
        """Mean of each loss over the steps since the last call and over all processes; starts anew."""
        names = list(self._sums)
        sums = torch.stack([self._sums[name] for name in names]).double()
        means = self._world.mean(sums / self._steps).tolist()
        self._sums, self._steps = {}, 0
        return dict(zip(names, means, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """What has been summed so far, averaged over the processes; call it on all of them."""
        sums = {name: self._world.mean(value) for name, value in self._sums.items()}
        return {"sums": sums, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        self._sums = {name: value.to(self._world.device) for name, value in state["sums"].items()}
        self._steps = state["steps"]


def _first_bad(pending: list[_StepLosses]) -> tuple[int, str, list[int]] | None:
    """Step, losses and images of the first step with a value that is not finite."""
    if not pending:
        return None
    values = torch.stack([noted.values for noted in pending]).cpu()
    for noted, row in zip(pending, values, strict=True):
        bad = [f"{name} = {v:g}" for name, v in zip(noted.names, row.tolist(), strict=True) if v - v != 0]
        if bad:
            return noted.step, ", ".join(bad), noted.image_ids
    return None
