"""Is training the heads what their definition says?  Step by step, against `plain_heads`, on the same RoIs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from plain_heads import DECAY, PlainHeads, Schedule, Step
from torch import Tensor

from doublehead.config import HeadConfig, HeadKind, LossConfig, ModelConfig, NonLocalConfig, TrainConfig
from doublehead.engine.optim import build_optimizer, learning_rate, set_learning_rate
from doublehead.models.conv_tower import ConvTower
from doublehead.models.heads import Heads
from doublehead.models.losses import head_losses
from doublehead.models.structures import RoISamples

CHANNELS, CLASSES, IMAGES, ROIS = 16, 4, 2, 16
SCHEDULE = Schedule(0.02, warmup=20, milestones=(35, 45))
"""Warm-up, the full rate and two drops, all within 50 steps."""
WEIGHTS = {
    "fc": {"fc": (1.0, 1.0)},
    "conv": {"conv": (1.0, 1.0)},
    "double_fc": {"fc_1": (2.0, 0.0), "fc_2": (0.0, 2.0)},
    "double_conv": {"conv_1": (2.5, 0.0), "conv_2": (0.0, 2.5)},
    "double_head": {"fc": (2.0, 0.0), "conv": (0.0, 2.5)},
    "double_head_reverse": {"fc": (0.0, 2.0), "conv": (2.5, 0.0)},
    "double_head_ext": {"fc": (1.4, 0.6), "conv": (0.5, 2.0)},
}
"""The paper's weights of the losses; 1.0 for single heads (Table 1)."""
TOWERS = {
    "fc": "fc: both tasks",
    "conv": "conv: both tasks",
    "double_fc": "fc: classes; fc: boxes",
    "double_conv": "conv: classes; conv: boxes",
    "double_head_ext": "Ext's fc and conv",
}


class Case(NamedTuple):
    """Heads to train."""

    kind: HeadKind
    blocks: int = 5
    non_local: NonLocalConfig = NonLocalConfig()

    def __str__(self) -> str:
        if self.kind in ("fc", "double_fc"):
            return TOWERS[self.kind]
        form = "non-local" if self.non_local.enabled else "without non-local"
        if self.non_local.pairwise == "embedded_gaussian":
            form = "non-local with softmax"
        return f"{TOWERS[self.kind]}, K = {self.blocks}, {form}"


CASES = [
    Case("fc"),
    Case("double_fc"),
    *(Case(kind, blocks) for kind in ("conv", "double_conv", "double_head_ext") for blocks in (1, 3, 5)),
    Case("double_conv", 3, NonLocalConfig(enabled=False)),
    Case("double_conv", 3, NonLocalConfig(pairwise="embedded_gaussian", groups=1)),
]


class Differences(NamedTuple):
    """The largest relative differences over all steps and tensors."""

    weights: float
    gradients: float
    statistics: float
    """The batch norms' running mean, running variance and count."""
    inference: float
    """Outputs in evaluation mode, after the last step."""


class Trained:
    """The library's heads, trained by its own towers, losses, optimiser and schedule."""

    def __init__(self, case: Case, dtype: torch.dtype, seed: int) -> None:
        head = HeadConfig(case.kind, fc_dim=32, conv_dim=32, conv_blocks=case.blocks, non_local=case.non_local)
        single = case.kind in ("fc", "conv")
        self.config = ModelConfig(head=head, loss=LossConfig(w_fc=1.0, w_conv=1.0) if single else LossConfig())
        self.schedule = TrainConfig(
            lr=SCHEDULE.rate, warmup_steps=SCHEDULE.warmup, milestones=SCHEDULE.milestones, weight_decay=DECAY
        )
        torch.manual_seed(seed)
        self.heads = Heads(head, self.config.roi, CHANNELS, CLASSES).to(dtype).train()
        self.optimizer = build_optimizer(self.heads, self.schedule)
        towers = [branch.tower for branch in self.heads.values() if isinstance(branch.tower, ConvTower)]
        if not all(tower.trains_fused() for tower in towers):
            raise AssertionError("the conv-head does not take the fused path, which is the one to check")

    def step(self, number: int, step: Step) -> dict[str, Tensor]:
        """As a trainer's step; returns the gradients, those of the maps too (as `PlainHeads.step`)."""
        set_learning_rate(self.optimizer, learning_rate(number, self.schedule))
        self.optimizer.zero_grad(set_to_none=True)
        pooled = {1.0: step.pooled["fc"].clone(), 1.3: step.pooled["conv"].to(memory_format=torch.channels_last)}
        maps = {"pooled.fc": pooled[1.0].requires_grad_(), "pooled.conv": pooled[1.3].requires_grad_()}
        rois = RoISamples(
            *(part.unflatten(0, (IMAGES, ROIS)) for part in (step.boxes, step.valid, step.labels, step.matched))
        )
        sum(head_losses(self.heads(pooled), rois, self.config).values()).backward()
        leaves = [*self.heads.named_parameters(), *maps.items()]
        gradients = {name: leaf.grad.clone() for name, leaf in leaves if leaf.grad is not None}
        self.optimizer.step()
        return gradients


def definition_of(trained: Trained, case: Case, dtype: torch.dtype = torch.float64) -> PlainHeads:
    """The formulas, with the weights that the library's heads have now."""
    state = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in trained.heads.state_dict().items()
    }
    softmax = case.non_local.pairwise == "embedded_gaussian"
    return PlainHeads(state, WEIGHTS[case.kind], softmax, case.non_local.groups)


def rois_of(number: int, seed: int, dtype: torch.dtype = torch.float64) -> Step:
    """The RoIs of a step: half of them background, one in ten drawn twice, objects that leave traces in the maps."""
    generator = torch.Generator().manual_seed(1000 * seed + number)
    count = IMAGES * ROIS

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    corner = normal(count, 2).abs() * 40
    boxes = torch.cat([corner, corner + 10 + normal(count, 2).abs() * 30], 1)
    labels = torch.randint(0, CLASSES, (count,), generator=generator) * (normal(count) > 0)
    maps = normal(2, count, CHANNELS, 7, 7)
    maps[:, torch.arange(count), labels] += 1.0
    valid = torch.rand(count, generator=generator) < 0.9
    pooled = {"fc": maps[0].to(dtype), "conv": maps[1].to(dtype)}
    matched = boxes + normal(count, 4)
    return Step(pooled, boxes.to(dtype), matched.to(dtype), labels, valid)


def train_both(case: Case, steps: int = 50, seed: int = 0) -> Differences:
    """Train the library's heads and the definition in float64, and compare them after every step."""
    trained = Trained(case, torch.float64, seed)
    plain = definition_of(trained, case)
    largest = [0.0, 0.0, 0.0]
    for number in range(steps):
        step = rois_of(number, seed)
        gradients, expected = trained.step(number, step), plain.step(step, SCHEDULE.at(number))
        state = trained.heads.state_dict()
        if gradients.keys() != expected.keys():
            raise AssertionError(f"gradients of {gradients.keys() ^ expected.keys()} on one side alone")
        found = (
            difference({name: state[name] for name in plain.parameters}, plain.parameters),
            difference(gradients, expected),
            difference({name: state[name] for name in plain.statistics}, plain.statistics),
        )
        largest = [max(pair) for pair in zip(largest, found, strict=True)]
    return Differences(*largest, inference_apart(trained, plain, rois_of(steps, seed)))


@torch.no_grad()
def inference_apart(trained: Trained, plain: PlainHeads, step: Step) -> float:
    """The difference of outputs in evaluation mode, which go by the running statistics and leave them alone."""
    trained.heads.eval()
    plain.training = False
    before = {name: tensor.clone() for name, tensor in trained.heads.state_dict().items()}
    found = trained.heads({1.0: step.pooled["fc"], 1.3: step.pooled["conv"]})
    if any(not tensor.equal(before[name]) for name, tensor in trained.heads.state_dict().items()):
        raise AssertionError("inference has changed the heads")
    largest = 0.0
    for branch in plain.weights:
        wanted = plain.outputs(branch, step.pooled["fc" if branch.startswith("fc") else "conv"])
        pairs = [pair for pair in zip(found[branch], wanted, strict=True) if pair[1] is not None]
        largest = max(largest, *(apart({"": actual}, {"": expected}) for actual, expected in pairs))
    return largest


def difference(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest difference of an entry, relative to the largest entry of its tensor.

    A tensor that is nothing but rounding, as the gradient of a bias before a batch norm, is measured by the largest
    entry of all.
    """
    whole = max((tensor.abs().max().item() for tensor in expected.values()), default=0.0)
    largest = 0.0
    for name, tensor in expected.items():
        own = tensor.abs().max().item()
        apart = (actual[name] - tensor).abs().max().item()
        largest = max(largest, apart / (own if own > 1e-9 * whole else whole))
    return largest


class InFloat32(NamedTuple):
    """How far gradients in float32 are from the exact ones of the same weights, all together and relative.

    The median of several weights: now and then a cell falls on the other side of a ReLU, whoever computes it.
    """

    library: float
    plain: float
    """The definition's own."""


def gradients_in_float32(case: Case, steps: int = 50, every: int = 5, seed: int = 0) -> InFloat32:
    """On the way of a training in float64, look each `every` steps what float32 makes of the weights there.

    Over many steps two trainings in float32 drift apart, whoever computes them: so each look begins anew.
    """
    trained = Trained(case, torch.float32, seed)
    exact, found = definition_of(trained, case), []
    for number in range(steps):
        if number % every == 0:
            state = {**exact.parameters, **exact.statistics}
            trained.heads.load_state_dict({name: tensor.detach() for name, tensor in state.items()})
            plain, same = definition_of(trained, case, torch.float32), definition_of(trained, case)
            step = rois_of(number, seed, torch.float32)
            wanted = same.step(Step(*(as_float64(part) for part in step)), 0.0)
            found.append([apart(trained.step(number, step), wanted), apart(plain.step(step, 0.0), wanted)])
        exact.step(rois_of(number, seed), SCHEDULE.at(number))
    return InFloat32(*torch.tensor(found).median(0).values.tolist())


def as_float64(part: Tensor | Mapping[str, Tensor]) -> Tensor | dict[str, Tensor]:
    if isinstance(part, Mapping):
        return {name: tensor.double() for name, tensor in part.items()}
    return part.double() if part.is_floating_point() else part


def apart(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The distance of all tensors together, relative to their length."""
    squares = [(actual[name].double() - tensor).square().sum() for name, tensor in expected.items()]
    return (sum(squares) / sum(tensor.square().sum() for tensor in expected.values())).sqrt().item()
