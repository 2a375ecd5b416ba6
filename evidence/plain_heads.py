"""The heads and their training written down a second time, as formulas: what the library's training must come to.

From the paper (Figures 1 and 5, Equations 1 to 3) and its release, whose networks are PyTorch's plain layers.  Of the
library nothing is used but the names of its tensors: no module, no operator, no optimiser.  Autograd makes the
gradients, in the dtype of the tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d

EPS, NORM_MOMENTUM = 1e-5, 0.1
"""Of PyTorch's BatchNorm2d, which the release leaves as they are."""
GROUPS = 4
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
MOMENTUM, DECAY, BIAS_FACTOR = 0.9, 1e-4, 2.0
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Step(NamedTuple):
    """What a training step learns from: N RoIs of all images, one after the other."""

    pooled: Mapping[str, Tensor]
    """"fc" and "conv" -> `Tensor[N, C, S, S]`: the same RoIs, pooled for either tower."""
    boxes: Tensor
    """`Tensor[N, 4]`"""
    matched: Tensor
    """`Tensor[N, 4]`: the object's box (any for background)."""
    labels: Tensor
    """`Tensor[N]` int64; 0 is background."""
    valid: Tensor
    """`Tensor[N]` bool: False: a RoI drawn twice, which batch norms see and losses do not."""


class PlainHeads:
    """Heads with all that training changes: parameters, running statistics, velocities.

    Args:
        state: the tensors by the names of the library's `Heads.state_dict()`; copied.
        weights: branch -> what its classification and its regression loss weigh.
        softmax: the non-local blocks' pairwise function: softmax, or division by the number of cells.
        groups: of the non-local blocks.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        weights: Mapping[str, tuple[float, float]],
        softmax: bool = False,
        groups: int = GROUPS,
    ) -> None:
        copies = {name: tensor.detach().clone() for name, tensor in state.items()}
        self.statistics = {name: tensor for name, tensor in copies.items() if name.endswith(STATISTICS)}
        self.parameters = {name: tensor for name, tensor in copies.items() if name not in self.statistics}
        self.velocities = {name: torch.zeros_like(tensor) for name, tensor in self.parameters.items()}
        self.weights, self.softmax, self.groups = weights, softmax, groups
        self.training = True

    def step(self, step: Step, rate: float) -> dict[str, Tensor]:
        """One step of SGD; returns the gradients of the parameters, and of the RoIs' maps as "pooled.fc" and so on."""
        wanted = self.parameters | {f"pooled.{name}": step.pooled[name].detach() for name in self.seen()}
        for tensor in wanted.values():
            tensor.requires_grad_(True)
        loss = self.loss(step._replace(pooled={name: wanted[f"pooled.{name}"] for name in self.seen()}))
        named = dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))
        with torch.no_grad():
            for name, weight in self.parameters.items():
                bias = name.endswith("bias")
                change = named[name] if bias else named[name] + DECAY * weight
                self.velocities[name] = MOMENTUM * self.velocities[name] + change
                weight -= (BIAS_FACTOR if bias else 1) * rate * self.velocities[name]
        return named

    def seen(self) -> set[str]:
        """The pooled maps that the branches look at."""
        return {"fc" if branch.startswith("fc") else "conv" for branch in self.weights}

    def loss(self, step: Step) -> Tensor:
        """Equations 1 to 3, without the RPN's part."""
        total = torch.zeros((), dtype=step.boxes.dtype)
        for branch, (of_classes, of_boxes) in self.weights.items():
            logits, deltas = self.outputs(branch, step.pooled["fc" if branch.startswith("fc") else "conv"])
            if logits is not None:
                total = total + of_classes * cross_entropy(logits, step)
            if deltas is not None:
                total = total + of_boxes * smooth_l1(deltas, step)
        return total

    def outputs(self, branch: str, maps: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Logits `Tensor[N, classes]` and deltas `Tensor[N, classes, 4]`; None for a task the branch does not have."""
        vector, found = self.vector(branch, maps), []
        for layer in ("classifier", "regressor"):
            at = f"{branch}.{layer}"
            found.append(self.linear(vector, at) if f"{at}.weight" in self.parameters else None)
        logits, deltas = found
        return logits, None if deltas is None else deltas.reshape(len(maps), -1, 4)

    def vector(self, branch: str, maps: Tensor) -> Tensor:
        """What a tower makes of RoIs: `Tensor[N, dim]`."""
        tower = f"{branch}.tower"
        if f"{tower}.0.shortcut.0.weight" not in self.parameters:
            return self.linear(self.linear(maps.flatten(1), f"{tower}.1").relu(), f"{tower}.3").relu()
        for block in self.blocks(tower):
            if f"{block}.shortcut.0.weight" in self.parameters:
                maps = self.widening(maps, block)
            elif f"{block}.theta.weight" in self.parameters:
                maps = self.non_local(maps, block)
            else:
                maps = self.bottleneck(maps, block)
        return maps.mean((2, 3))

    def blocks(self, tower: str) -> Iterator[str]:
        number = 0
        while any(name.startswith(f"{tower}.{number}.") for name in self.parameters):
            yield f"{tower}.{number}"
            number += 1

    def widening(self, x: Tensor, at: str) -> Tensor:
        inner = self.conv_norm(x, f"{at}.residual.0", f"{at}.residual.1").relu()
        residual = self.conv_norm(inner, f"{at}.residual.3", f"{at}.residual.4")
        return (residual + self.conv_norm(x, f"{at}.shortcut.0", f"{at}.shortcut.1")).relu()

    def bottleneck(self, x: Tensor, at: str) -> Tensor:
        inner = self.conv_norm(x, f"{at}.residual.0", f"{at}.residual.1").relu()
        inner = self.conv_norm(inner, f"{at}.residual.3", f"{at}.residual.4").relu()
        return (x + self.conv_norm(inner, f"{at}.residual.6", f"{at}.residual.7")).relu()

    def non_local(self, x: Tensor, at: str) -> Tensor:
        number, _, height, width = x.shape
        cells = height * width
        theta, phi, g = (self.conv(x, f"{at}.{part}").reshape(number, self.groups, -1, cells) for part in PARTS)
        pairwise = torch.einsum("ngci,ngcj->ngij", theta, phi)
        pairwise = pairwise.softmax(3) if self.softmax else pairwise / cells
        mixed = torch.einsum("ngij,ngcj->ngci", pairwise, g).reshape(number, -1, height, width)
        return (x + self.conv_norm(mixed, f"{at}.out", f"{at}.norm")).relu()

    def conv_norm(self, x: Tensor, conv: str, norm: str) -> Tensor:
        return self.norm(self.conv(x, conv), norm)

    def conv(self, x: Tensor, at: str) -> Tensor:
        weight = self.parameters[f"{at}.weight"]
        return conv2d(x, weight, self.parameters.get(f"{at}.bias"), padding=weight.shape[2] // 2)

    def linear(self, x: Tensor, at: str) -> Tensor:
        return x @ self.parameters[f"{at}.weight"].T + self.parameters[f"{at}.bias"]

    def norm(self, x: Tensor, at: str) -> Tensor:
        """By the statistics of the batch in training, which the running ones follow; else by the running ones."""
        if self.training:
            mean = x.mean((0, 2, 3))
            variance = (x - mean[:, None, None]).square().mean((0, 2, 3))
            self.follow(at, mean.detach(), variance.detach(), x.numel() // x.shape[1])
        else:
            mean, variance = (self.statistics[f"{at}.{name}"] for name in ("running_mean", "running_var"))
        scale, shift = (self.parameters[f"{at}.{name}"] for name in ("weight", "bias"))
        factor = scale / (variance + EPS).sqrt()
        return (x - mean[:, None, None]) * factor[:, None, None] + shift[:, None, None]

    def follow(self, at: str, mean: Tensor, variance: Tensor, count: int) -> None:
        """Running statistics after a batch of `count` cells; theirs is the unbiased variance."""
        for name, value in (("running_mean", mean), ("running_var", variance * count / (count - 1))):
            running = self.statistics[f"{at}.{name}"]
            running.copy_((1 - NORM_MOMENTUM) * running + NORM_MOMENTUM * value)
        self.statistics[f"{at}.num_batches_tracked"] += 1


PARTS = ("theta", "phi", "g")


def cross_entropy(logits: Tensor, step: Step) -> Tensor:
    """Mean over the RoIs that count."""
    own = logits.gather(1, step.labels[:, None])[:, 0]
    return (logits.exp().sum(1).log() - own)[step.valid].mean()


def smooth_l1(deltas: Tensor, step: Step) -> Tensor:
    """Of the positives' own classes, summed, over the number of all RoIs that count."""
    positive = (step.valid & (step.labels > 0)).nonzero()[:, 0]
    error = (deltas[positive, step.labels[positive]] - encoded(step.matched, step.boxes)[positive]).abs()
    return torch.where(error < 1, error**2 / 2, error - 1 / 2).sum() / step.valid.sum()


def encoded(matched: Tensor, boxes: Tensor) -> Tensor:
    """What the regressor should say, `Tensor[N, 4]` (Girshick et al. 2014)."""
    (x, y, width, height), (ox, oy, owidth, oheight) = (centre_and_sides(each) for each in (boxes, matched))
    moves = (ox - x) / width, (oy - y) / height, (owidth / width).log(), (oheight / height).log()
    return torch.stack([weight * move for weight, move in zip(BOX_WEIGHTS, moves, strict=True)], 1)


def centre_and_sides(boxes: Tensor) -> tuple[Tensor, ...]:
    x1, y1, x2, y2 = boxes.unbind(1)
    return (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1


class Schedule(NamedTuple):
    """The release's rate: linear warm-up, then a tenth from each milestone on."""

    rate: float
    warmup: int
    milestones: tuple[int, ...]
    warmup_factor: float = 1 / 3

    def at(self, step: int) -> float:
        """Of step 0, 1, ..."""
        reached = sum(step >= milestone for milestone in self.milestones)
        share = min(step / self.warmup, 1.0)
        return self.rate * 0.1**reached * (self.warmup_factor * (1 - share) + share)
