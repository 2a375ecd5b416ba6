"""Is the implementation right?  Checks that ask for no accuracy, written to evidence/records/implementation.json.

python evidence/implementation.py           runs every check, a minute or two on one core, and writes the record
python evidence/implementation.py --print   writes nothing

Training is compared with formulas (`plain_heads`), starting values with the release's rules (`starting_values`), batch
norms and learning rates with theirs (`norms_and_rates`).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gradient_flow import CASES, Case, gradients_in_float32, train_both
from norms_and_rates import norm_settings, rates, train_detector
from plain_heads import PlainHeads
from starting_values import SIGMAS, Scale, drawn, expected_of_cells, misfits, scale_of

from doublehead.analysis.provenance import provenance
from doublehead.config import HeadConfig, RoIConfig
from doublehead.models.heads import Heads

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "evidence" / "records" / "implementation.json"
SEEDS = (0, 1, 2)
FLOAT64, TWICE, OF_MEAN = 1e-8, 2.0, 0.03
IN_FLOAT32 = (Case("double_fc"), Case("double_conv"), Case("double_head_ext", 3))


class Widths(NamedTuple):
    """Heads whose starting values are looked at, and the RoIs they are fed."""

    name: str
    head: HeadConfig
    channels: int
    rois: int
    classes: int


WIDTHS = (
    Widths("the paper's widths", HeadConfig("double_head_ext"), 256, 16, 81),
    Widths("the miniature's", HeadConfig("double_head_ext", fc_dim=256, conv_dim=128, conv_blocks=3), 64, 64, 4),
)
DIFFERENCES = [
    {
        "what": "scales of the conv-head's batch norms at the start",
        "here": "1, PyTorch's default since 1.2",
        "release": "drawn from 0 .. 1: the default of PyTorch 1.0.0, with which its README says it was trained",
        "effect": "its conv-head's vectors, logits and deltas start about half as large (see scales); its boxes come "
        "out worse after a short training on shapes (conv_norms.json)",
    },
    {
        "what": "the count of steps in the schedule",
        "here": "the first step has the rate of step 0, 1/3 of the full one",
        "release": "the scheduler steps before the optimiser: the first step has the rate of step 1",
        "effect": "every change comes one step later: 0.4 % of the first step's rate",
    },
    {
        "what": "RoIs of a batch norm's batch",
        "here": "all of a step's on one device, 8 x 512 in the paper's recipes on one GPU",
        "release": "2 x 512: four GPUs, norms not synchronised",
        "effect": "statistics of four times as many RoIs; the same with four processes",
    },
]
"""What is known to differ from the release, and stays."""


class Check(NamedTuple):
    """What was compared, how far it was apart, and how far it may be."""

    name: str
    compared: str
    largest_difference: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.largest_difference <= self.bound


def of_training() -> Iterator[Check]:
    what = (
        "weights, gradients (the maps' too) and running statistics after each of 50 steps of SGD, then outputs at "
        "inference; float64"
    )
    for case in CASES:
        yield Check(f"training, {case}", what, max(train_both(case)), FLOAT64)
    for case in IN_FLOAT32:
        found = gradients_in_float32(case)
        yield Check(
            f"gradients in float32, {case}",
            f"distance from the exact ones, {found.library:.2g}, to the formulas' own in float32, {found.plain:.2g}",
            found.library / found.plain,
            TWICE,
        )


def fresh(widths: Widths, seed: int) -> Heads:
    torch.manual_seed(seed)
    return Heads(widths.head, RoIConfig(), widths.channels, widths.classes).train()


def of_start(widths: Widths) -> Iterator[Check]:
    worst = max(misfit for seed in SEEDS for _, misfit in misfits(fresh(widths, seed).state_dict()))
    yield Check(
        f"starting values, {widths.name}",
        "mean and standard deviation of every tensor with the release's rule, in standard errors; constants exactly",
        worst,
        SIGMAS,
    )
    found = [measured(fresh(widths, seed), widths, seed) for seed in SEEDS]
    expected, _ = expected_of_cells((widths.head.conv_blocks - 1) // 2, "ones")
    yield Check(
        f"the conv-head's vectors at the start, {widths.name}",
        f"their mean with {expected:.3f}, which follows from batch norm and ReLU alone",
        max(abs(scales["conv"].vector_mean / expected - 1) for scales in found),
        OF_MEAN,
    )
    for name, std, number in (("logits", 0.01, widths.classes), ("deltas", 0.001, 4 * widths.classes)):
        errors = (abs(getattr(s, name) / (std * s.length) - 1) for scales in found for s in scales.values())
        yield Check(
            f"{name} at the start, {widths.name}",
            f"their size with {std:g} times the vectors' length, in standard errors of {number} rows",
            max(errors) * math.sqrt(2 * number),
            SIGMAS,
        )


@torch.no_grad()
def measured(heads: Heads, widths: Widths, seed: int) -> dict[str, Scale]:
    """The outputs' scale of the library's heads in training, on maps of rectified noise."""
    maps, scales = noise(widths, seed), {}
    for name, head in heads.items():
        output = head(maps)
        scales[name] = scale_of(head.tower(maps), output.logits, output.deltas)
    return scales


@torch.no_grad()
def as_the_release_was_trained(widths: Widths, seed: int) -> Scale:
    """The conv-head's scale with norms' scales drawn from 0 .. 1."""
    heads = PlainHeads(drawn(fresh(widths, seed).state_dict(), "uniform"), {})
    maps = noise(widths, seed)
    logits, deltas = heads.outputs("conv", maps)
    return scale_of(heads.vector("conv", maps), logits, deltas)


def noise(widths: Widths, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(widths.rois, widths.channels, 7, 7, generator=generator).relu()


def scales() -> dict[str, Any]:
    """How large the outputs start, the mean over the seeds, for the record."""
    table = {}
    for widths in WIDTHS:
        found = [measured(fresh(widths, seed), widths, seed) for seed in SEEDS]
        rows = {name: [each[name] for each in found] for name in ("fc", "conv")}
        rows["conv, norms' scales from 0 .. 1"] = [as_the_release_was_trained(widths, seed) for seed in SEEDS]
        table[widths.name] = {
            name: Scale(*(round(value, 4) for value in torch.tensor(row).mean(0).tolist()))._asdict()
            for name, row in rows.items()
        }
    return table


def of_rules() -> Iterator[Check]:
    heads = fresh(WIDTHS[1], 0)
    yield Check("eps and momentum of the conv-head's norms", "with 1e-5 and 0.1", norm_settings(heads), 0.0)
    moved = train_detector()
    yield Check("frozen layers", "tensors of frozen norms, stem and stage 1 that training changes", moved.frozen, 0.0)
    yield Check("live norms", "running statistics of the heads that training leaves", moved.statistics, 0.0)
    yield Check("trainable parameters", "those that training leaves", moved.others, 0.0)
    found = rates()
    steps = "with the release's rule for its name, over warm-up and milestones"
    yield Check("learning rates", f"each parameter's {steps}", found.rate, 1e-12)
    yield Check("weight decay", f"each parameter's {steps}", found.decay, 1e-12)
    yield Check("an optimiser's step", f"each parameter's change for gradients of 1, {steps}", found.change, 1e-10)


def checks() -> Iterator[Check]:
    """All checks, each when it is done."""
    yield from of_training()
    for widths in WIDTHS:
        yield from of_start(widths)
    yield from of_rules()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", dest="only_print", help="write no record")
    only_print = parser.parse_args().only_print
    begun, done = time.monotonic(), []
    for check in checks():
        done.append(check)
        print(f"{'ok' if check.passed else 'FAILED':6}  {check.largest_difference:9.2g}  {check.name}", flush=True)
    record = {
        "what": __doc__.partition("\n")[0],
        **provenance(),
        "command": "python evidence/implementation.py",
        "seeds": list(SEEDS),
        "seconds": round(time.monotonic() - begun, 1),
        "checks": [{**check._asdict(), "passed": check.passed} for check in done],
        "scales": scales(),
        "differences": DIFFERENCES,
    }
    if not only_print:
        RECORD.parent.mkdir(exist_ok=True)
        RECORD.write_text(json.dumps(record, indent=2) + "\n")
    return 0 if all(check.passed for check in done) else 1


if __name__ == "__main__":
    sys.exit(main())
