"""The options of each figure of `doublehead analyze`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from doublehead.config import HeadKind
from doublehead.engine.data_options import EvaluationData

Positional = tyro.conf.Positional
HEADS = tyro.conf.arg(metavar="HEAD...")


@dataclass(frozen=True)
class Output:
    """Where the results go."""

    out: str
    """Folder for the PNG and CSV files; an interrupted analysis continues from the state it left there."""
    device: str = "auto"
    """`auto`: CUDA if available, otherwise CPU."""


@dataclass(frozen=True)
class SlidingWindows(Output):
    """Figures 2 and 7: scores and regressed boxes of windows around every object, by the windows' IoU.

    Windows are binned by their own IoU with the object; the second row shows the IoU of the box that the regressor of
    the object's class makes of the window.  Crowd and difficult objects are left out.
    """

    heads: Annotated[tuple[str, ...], Positional, HEADS] = ()
    """Heads to compare, each as [NAME=]CHECKPOINT[:READOUT]; READOUT (for Ext models) is fused, split, fc or conv.  The
    same NAME several times: one head from several seeds, drawn as their mean.  Differences are taken seed by seed, in
    the order given."""
    data: EvaluationData = field(default_factory=EvaluationData)
    difficulty: str | None = None
    """A run's folder or metrics.json (in the paper, the FPN baseline's).  Its AP per class ranks the classes into
    easy, medium and hard thirds.  Without it there are no such groups."""
    chunk: int = 4096
    """Number of windows per pass through the heads."""
    seed: int = 0
    """Seed of the windows' random jitter."""
    objects: int | None = None
    """Measure only the data's first pictures, until they have this many objects; the default is all."""


@dataclass(frozen=True)
class Pearson(Output):
    """Figure 3: correlation of scores with boxes' IoUs, for sliding windows, RPN proposals and detections.

    Windows and proposals count with the score of their object's class and their own IoU, before regression; detections
    with their score and the regressed box's IoU.  Crowd and difficult objects are left out.
    """

    heads: Annotated[tuple[str, ...], Positional, HEADS] = ()
    """Heads to compare, each as [NAME=]CHECKPOINT[:READOUT]; READOUT (for Ext models) is fused, split, fc or conv.  The
    same NAME several times: one head from several seeds, drawn as their mean.  Differences are taken seed by seed, in
    the order given."""
    data: EvaluationData = field(default_factory=EvaluationData)
    difficulty: str | None = None
    """A run's folder or metrics.json whose AP per class ranks the classes into easy, medium and hard."""
    background: Literal["leave-out", "include"] = "leave-out"
    """Proposals that overlap no object: `leave-out` ignores them; `include` counts each with its highest score of any
    class and an IoU of 0, in the group of all objects only."""
    chunk: int = 4096
    """Number of windows per pass through the heads."""
    seed: int = 0
    """Seed of the windows' random jitter."""
    objects: int | None = None
    """Measure only the data's first pictures, until they have this many objects; the default is all."""


@dataclass(frozen=True)
class FCWeights(Output):
    """Figure 4: correlation between the cells' weights in the first layer of an fc-head."""

    checkpoints: Annotated[tuple[str, ...], Positional, tyro.conf.arg(metavar="CHECKPOINT...")] = ()
    """Checkpoints, each as [NAME=]CHECKPOINT; all fc-heads of each are drawn."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace the tables and the figure that an earlier call left in --out."""


@dataclass(frozen=True)
class FeatureCorrelation(Output):
    """Figure 8: spatial correlation of the heads' input and output maps."""

    checkpoints: Annotated[tuple[str, ...], Positional, tyro.conf.arg(metavar="CHECKPOINT...")] = ()
    """Checkpoints, each as [NAME=]CHECKPOINT; all heads of each are drawn."""
    data: EvaluationData = field(default_factory=EvaluationData)


@dataclass(frozen=True)
class BalanceWeights(Output):
    """Figure 6: AP over the balance weights (l_fc, l_conv) of Ext, for its four read-outs.

    Trains the missing runs, each in OUT/runs, and continues an unfinished grid.
    """

    recipe: str = "miniature-double-head-ext"
    """An Ext recipe; the grid changes its l_fc and l_conv."""
    l_fc: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    l_conv: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    heads: str | None = None
    """A heads.json of `analyze heads` whose variants change model.loss.l_fc and model.loss.l_conv: draw these, their
    mean over its seeds, and train nothing; --out alone counts then."""
    runs: str | None = None
    """Another folder whose finished runs of the recipe are used."""
    collect: tyro.conf.FlagCreatePairsOff[bool] = False
    """Train nothing: draw the finished runs and leave gaps."""
    steps: int | None = None
    """Number of steps of each run, with milestones in proportion; the default is the recipe's."""
    seed: int | None = None
    """Seed of each training; the default is the recipe's."""


@dataclass(frozen=True)
class Qualitative(Output):
    """Figures 9 and 10: ground truth, conv-head alone, fc-head alone and Ext, side by side, where they differ most.

    For an object that one head finds twice, the proposals of its boxes are yellow; both heads see them, and a dashed
    frame shows where each head moves them.
    """

    checkpoint: Annotated[str, Positional, tyro.conf.arg(metavar="CHECKPOINT")] = ""
    """Checkpoint of a Double-Head-Ext."""
    data: EvaluationData = field(default_factory=EvaluationData)
    cases: int = 3
    """Number of cases of each kind."""
    score_threshold: float = 0.5
    """Detections with a lower score count as not found."""


@dataclass(frozen=True)
class Heads(Output):
    """Heads of all kinds, trained side by side on a frozen detector's RoIs (Tables 1 and 3, factors one at a time).

    Backbone and RPN are CHECKPOINT's and stay as they are; their features of every image are computed once, into
    OUT/features.  Every distinct head is trained once, on the very same RoIs as all others, and the kinds are put
    together at evaluation.  Optimiser and schedule are those of CHECKPOINT's recipe.  An interrupted training goes on;
    under torchrun each process takes some of the seeds.
    """

    checkpoint: Annotated[str, Positional, tyro.conf.arg(metavar="CHECKPOINT")] = ""
    """The detector whose backbone and RPN are kept; its own heads are not used."""
    data: EvaluationData = field(default_factory=EvaluationData)
    train_images: int | None = None
    """Use only the first N training images; the default is the recipe's."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the trainings: initial weights, order of images, sampling of RoIs."""
    kinds: tuple[HeadKind, ...] = (
        "fc", "conv", "double_fc", "double_conv", "double_head_reverse", "double_head", "double_head_ext",
    )  # fmt: skip
    """Head kinds to evaluate."""
    steps: int = 1440
    """Steps of each training; the recipe's schedule keeps its shape."""
    images: int = 8
    """Images of each step; the recipe's model.roi.samples RoIs are drawn of each."""
    set: tuple[str, ...] = ()
    """Changes of the base, each FIELD=VALUE, such as train.lr=0.002 or model.roi.samples=64."""
    vary: tuple[str, ...] = ()
    """Variants, each FIELD=VALUE or FIELD=VALUE,FIELD=VALUE, such as model.roi.conv_box_scale=1.0; trained beside the
    base on the same images."""
    varied_kinds: tuple[HeadKind, ...] = ("fc", "double_head")
    """Head kinds that are evaluated in each variant, where it changes them."""
    evaluate_at: tuple[int, ...] = ()
    """Evaluate after these steps and the last; the default is the last, a half, a quarter, an eighth, a sixteenth."""
    windows: int = 16
    """Sliding windows of each validation object on which heads are read (see sliding-windows); 0: none."""
    save_models: tuple[HeadKind, ...] = ("fc", "conv", "double_fc", "double_head", "double_head_ext")
    """Kinds of the base that are written as detectors, to OUT/models."""
    save_every: int = 100
    """Save the state of the training each so many steps."""
