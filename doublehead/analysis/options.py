"""What each sub-command of `doublehead analyze` takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from doublehead.engine.data_options import EvaluationData

Positional = tyro.conf.Positional
HEADS = tyro.conf.arg(metavar="HEAD...")


@dataclass(frozen=True)
class Output:
    """Where the results go."""

    out: str
    """Folder for the PNG and CSV files; a stopped analysis goes on from what it left there."""
    device: str = "auto"
    """`auto`: CUDA where there is one, else CPU."""


@dataclass(frozen=True)
class SlidingWindows(Output):
    """Figures 2 and 7: scores and regressed boxes of windows around every object, by the windows' IoU.

    Bins go by the window's own IoU with its object; the second row is the IoU of the box that the regressor of the
    object's class makes of the window.  Crowd and difficult objects are not there.
    """

    heads: Annotated[tuple[str, ...], Positional, HEADS] = ()
    """What to compare, each as [NAME=]CHECKPOINT[:READOUT]; READOUT, of an Ext model: fused, split, fc or conv."""
    data: EvaluationData = field(default_factory=EvaluationData)
    difficulty: str | None = None
    """A run's folder or metrics.json (the paper: of the FPN baseline): its AP per class ranks the classes, thirds of
    them are easy, medium and hard.  Without it there are no such groups."""
    chunk: int = 4096
    """Windows per pass through the heads."""
    seed: int = 0
    """Of the windows' jitter."""


@dataclass(frozen=True)
class Pearson(Output):
    """Figure 3: correlation of scores with boxes' IoUs, for sliding windows, RPN proposals and detections.

    Windows and proposals go with the score of their object's class and with their own IoU, before regression;
    detections with their score and with the regressed box's IoU.  Crowd and difficult objects are not there.
    """

    heads: Annotated[tuple[str, ...], Positional, HEADS] = ()
    """What to compare, each as [NAME=]CHECKPOINT[:READOUT]; READOUT, of an Ext model: fused, split, fc or conv."""
    data: EvaluationData = field(default_factory=EvaluationData)
    difficulty: str | None = None
    """A run's folder or metrics.json whose AP per class ranks the classes into easy, medium and hard."""
    background: Literal["leave-out", "include"] = "leave-out"
    """Proposals that overlap no object have no class of an object: `leave-out`; `include`: each counts as the detection
    it would become, with its highest score of any class and the IoU 0, in the group of all alone."""
    chunk: int = 4096
    """Windows per pass through the heads."""
    seed: int = 0
    """Of the windows' jitter."""


@dataclass(frozen=True)
class FCWeights(Output):
    """Figure 4: correlation between the cells' weights in the first layer of an fc-head."""

    checkpoints: Annotated[tuple[str, ...], Positional, tyro.conf.arg(metavar="CHECKPOINT...")] = ()
    """Each as [NAME=]CHECKPOINT; all fc-heads of each are drawn."""


@dataclass(frozen=True)
class FeatureCorrelation(Output):
    """Figure 8: spatial correlation of the maps that go into the heads and come out of them."""

    checkpoints: Annotated[tuple[str, ...], Positional, tyro.conf.arg(metavar="CHECKPOINT...")] = ()
    """Each as [NAME=]CHECKPOINT; all heads of each are drawn."""
    data: EvaluationData = field(default_factory=EvaluationData)


@dataclass(frozen=True)
class BalanceWeights(Output):
    """Figure 6: AP over the balance weights (l_fc, l_conv) of Ext, for its four read-outs.

    Trains what is missing, each run in OUT/runs, and goes on with a half-done grid.
    """

    recipe: str = "miniature-double-head-ext"
    """An Ext recipe; the grid changes its l_fc and l_conv."""
    l_fc: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    l_conv: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    runs: str | None = None
    """Take finished runs of the recipe from this folder too."""
    collect: tyro.conf.FlagCreatePairsOff[bool] = False
    """Train nothing: draw what is there and leave gaps."""
    steps: int | None = None
    """Train each run this long, milestones in proportion; without it as the recipe says."""
    seed: int | None = None


@dataclass(frozen=True)
class Qualitative(Output):
    """Figures 9 and 10: ground truth, conv-head alone, fc-head alone and Ext, side by side, where they differ most.

    Of an object that one head finds twice, the proposals its boxes come from are yellow; both heads see them, and
    dashed is where each head moves them.
    """

    checkpoint: Annotated[str, Positional, tyro.conf.arg(metavar="CHECKPOINT")] = ""
    """Of a Double-Head-Ext."""
    data: EvaluationData = field(default_factory=EvaluationData)
    cases: int = 3
    """How many of each kind."""
    score_threshold: float = 0.5
    """Detections below it count as not found."""
