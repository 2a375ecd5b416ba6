"""Do fresh heads start as the release's?  Every tensor against the formula of its distribution, then the outputs.

What the release sets: fully connected layers by Kaiming's uniform rule with a = 1, classifiers N(0, 0.01), regressors
N(0, 0.001), their biases 0; the last convolution of a non-local block 0.  All else is left to PyTorch: convolutions
uniform within 1 / sqrt(fan in), the non-local blocks' biases too; batch norms' shifts 0, their running statistics 0
and 1.  Their scales are 1 since PyTorch 1.2; in 1.0, with which the release was trained, they were drawn from 0 .. 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

NormScales = Literal["ones", "uniform"]
SIGMAS = 5.0
"""How many standard errors a sample's mean and standard deviation may be off."""


class Draw(NamedTuple):
    """What a tensor is drawn from."""

    form: Literal["uniform", "normal", "constant"]
    size: float
    """Half the width, the standard deviation, or the value."""
    middle: float = 0.0

    @property
    def std(self) -> float:
        return {"uniform": self.size / math.sqrt(3), "normal": self.size, "constant": 0.0}[self.form]

    def sample(self, shape: torch.Size) -> Tensor:
        if self.form == "constant":
            return torch.full(shape, self.size)
        drawn = torch.rand(shape) * 2 - 1 if self.form == "uniform" else torch.randn(shape)
        return self.middle + self.size * drawn


def rule(name: str, state: Mapping[str, Tensor], scales: NormScales = "ones") -> Draw:
    """What the release draws the tensor `name` of the library's `Heads` from."""
    part, _, kind = name.rpartition(".")
    weight = state.get(f"{part}.weight")
    fan_in = weight[0].numel() if weight is not None else 0
    if kind in ("running_mean", "num_batches_tracked"):
        return Draw("constant", 0.0)
    if kind == "running_var":
        return Draw("constant", 1.0)
    if f"{part}.running_mean" in state:
        if kind == "weight":
            return Draw("constant", 1.0) if scales == "ones" else Draw("uniform", 0.5, 0.5)
        return Draw("constant", 0.0)
    if part.endswith(("theta", "phi", "g")) or (kind == "weight" and weight.dim() == 4 and not part.endswith("out")):
        return Draw("uniform", fan_in**-0.5)
    if kind == "bias" or part.endswith(".out"):
        return Draw("constant", 0.0)
    if part.endswith("classifier"):
        return Draw("normal", 0.01)
    return Draw("normal", 0.001) if part.endswith("regressor") else Draw("uniform", (3 / fan_in) ** 0.5)


def misfit(values: Tensor, draw: Draw) -> float:
    """How badly a sample fits, in standard errors of its mean and its standard deviation; infinite: it cannot be."""
    if draw.form == "constant":
        return 0.0 if (values == draw.size).all() else math.inf
    number, values = values.numel(), values.double() - draw.middle
    furthest = values.abs().max().item() / draw.size
    reach = {"uniform": (1 - 20 / number, 1.0 + 1e-6), "normal": (2.5, 10.0)}[draw.form]
    if number >= 1000 and not reach[0] <= furthest <= reach[1]:  # the form: a normal one reaches further
        return math.inf
    excess = {"uniform": 1.8, "normal": 3.0}[draw.form]
    of_mean = values.mean().abs().item() / (draw.std / math.sqrt(number))
    of_std = abs(values.square().mean().sqrt().item() / draw.std - 1) / math.sqrt((excess - 1) / (4 * number))
    return max(of_mean, of_std)


def misfits(state: Mapping[str, Tensor]) -> Iterator[tuple[str, float]]:
    """Every tensor's name, and its misfit."""
    for name, tensor in state.items():
        yield name, misfit(tensor, rule(name, state))


def drawn(state: Mapping[str, Tensor], scales: NormScales) -> dict[str, Tensor]:
    """Tensors like those of `state`, drawn by the release's rules."""
    samples = {name: rule(name, state, scales).sample(tensor.shape) for name, tensor in state.items()}
    return {name: samples[name].to(tensor.dtype) for name, tensor in state.items()}


class Scale(NamedTuple):
    """How large the outputs of a tower and its predictors are."""

    vector_mean: float
    vector_std: float
    """Over RoIs and units."""
    length: float
    """Root of the mean squared length of a vector."""
    logits: float
    """Standard deviation, about a mean of 0."""
    deltas: float


def scale_of(vector: Tensor, logits: Tensor, deltas: Tensor) -> Scale:
    length = vector.square().sum(1).mean().sqrt()
    return Scale(*(value.item() for value in (vector.mean(), vector.std(), length, rms(logits), rms(deltas))))


def rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()


def expected_of_cells(bottlenecks: int, scales: NormScales, samples: int = 1_000_000) -> tuple[float, float]:
    """Mean and mean square of the conv-head's last map, by the formulas alone.

    Batch norm makes each branch's channel normal about 0 with its scale as standard deviation, whatever the
    convolutions: the first block is relu(a + b); a non-local block adds nothing; a bottleneck makes relu(x + c) of x.
    """
    generator = torch.Generator().manual_seed(0)

    def branch() -> Tensor:
        scale = torch.rand(samples, generator=generator) if scales == "uniform" else 1.0
        return torch.randn(samples, generator=generator) * scale

    cells = (branch() + branch()).relu()
    for _ in range(bottlenecks):
        cells = (cells + branch()).relu()
    return cells.mean().item(), cells.square().mean().item()
