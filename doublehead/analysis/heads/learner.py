"""One head in training, with an optimiser of its own: it never sees another head's gradient."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from doublehead.analysis.heads.specs import HeadSpec
from doublehead.engine.errors import NonFiniteLossError
from doublehead.engine.optim import WeightAverage, build_optimizer, learning_rate, set_learning_rate
from doublehead.engine.schema import is_finite
from doublehead.models.heads import build_head
from doublehead.models.losses import box_loss, classification_loss


class Part(NamedTuple):
    """RoIs that go through a head together: batch norms see all of them, and no others."""

    pooled: Tensor
    """`Tensor[N, C, S, S]`."""
    labels: Tensor
    """`Tensor[N]` int64; 0 is background."""
    valid: Tensor
    """`Tensor[N]` bool: False repeats another RoI and carries no loss."""
    wanted: Tensor
    """`Tensor[N, 4]`: the encoded box of each RoI's object."""


class Learner:
    """A head, its optimiser and, with `train.ema_decay`, its averaged weights.

    Heads of one tower start from the same tower for one seed, whichever tasks they have, and whichever others are
    trained beside them.

    Args:
        spec: what is trained, and how.
        channels, num_classes: of the detector.
        seed: of the initial weights.
        device: where it is trained.
    """

    def __init__(self, spec: HeadSpec, channels: int, num_classes: int, seed: int, device: torch.device) -> None:
        self.spec = spec
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random.Random(f"{seed}/{spec.branch.tower}").getrandbits(63))
            head = build_head(spec.branch, spec.head, spec.roi, channels, num_classes)
        self.head = head.to(device, memory_format=torch.channels_last)
        self.average = None if spec.train.ema_decay is None else WeightAverage(self.head, spec.train.ema_decay)
        self.optimizer = build_optimizer(self.head, spec.train)
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    @property
    def evaluated(self) -> nn.Module:
        """The head to evaluate and save: of averaged weights where averaging is on."""
        return self.average.model if self.average else self.head

    def step(self, step: int, parts: list[Part]) -> None:
        """One optimizer step (from 0) on all parts; their gradients are averaged."""
        set_learning_rate(self.optimizer, learning_rate(step, self.spec.train))
        self.optimizer.zero_grad(set_to_none=True)
        self.head.train()
        for part in parts:
            losses = self._losses(part)
            (sum(losses.values()) / len(parts)).backward()
            for name, value in losses.items():
                self._sums[name] = self._sums.get(name, 0.0) + value.detach() / len(parts)
        if self.spec.train.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.head.parameters(), self.spec.train.clip_grad_norm)
        self.optimizer.step()
        if self.average:
            self.average.update(self.head)
        self._steps += 1

    def _losses(self, part: Part) -> dict[str, Tensor]:
        output = self.head(part.pooled)
        of_classes, of_boxes = self.spec.weights
        losses = {}
        if output.logits is not None:
            losses["loss_cls"] = of_classes * classification_loss(output.logits, part.labels, part.valid)
        if output.deltas is not None:
            losses["loss_reg"] = of_boxes * box_loss(
                output.deltas, part.wanted, part.labels, part.valid, self.spec.beta
            )
        return losses

    def take_losses(self) -> dict[str, float]:
        """The mean weighted losses since the last call."""
        means = {name: float(value) / self._steps for name, value in self._sums.items()}
        self._sums, self._steps = {}, 0
        return means

    def check(self) -> None:
        """Call it before anything is evaluated or saved.

        Raises:
            NonFiniteLossError: a loss since the last `take_losses` or a weight is not finite.
        """
        values = {**self._sums, **self.evaluated.state_dict()}
        wrong = [name for name, value in values.items() if not is_finite(value)]
        if wrong:
            raise NonFiniteLossError(
                f"{self.spec.label}: {wrong[0]} is not finite with {self.spec.train.optimizer} at a learning rate of "
                f"{self.spec.train.lr:g}: lower it"
            )

    def state_dict(self) -> dict[str, Any]:
        """All that the coming steps depend on."""
        return {
            "head": self.head.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "optimizer": self.optimizer.state_dict(),
            "sums": self._sums,
            "steps": self._steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        self.head.load_state_dict(state["head"])
        if self.average:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._sums, self._steps = dict(state["sums"]), state["steps"]
