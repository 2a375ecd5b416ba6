"""The paper's findings that are tested here, each with the number that decides it and a reason written by hand.

`paired.verdict` decides; nobody else does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from paired import Effect, paired
from reading import Record, Seeds, correlation, of_runs

from doublehead.analysis.heads.curves import of_heads, over_windows

Records = dict[str, Record]
Measure = Callable[[Record], Effect | None]
"""The difference in a record, positive in the paper's direction; None: it is not in there."""
HEADS, NARROW, LONGER = "heads-shapes", "heads-narrow", "heads-longer"


class Test(NamedTuple):
    """One number that a claim is decided by."""

    words: str
    record: str
    effect: Measure
    paper: float | None = None
    """The paper's difference, in the same unit."""
    digits: int = 1


class Finding(NamedTuple):
    """One claim of the paper."""

    claim: str
    where: str
    """The table or figure of the paper."""
    tests: tuple[Test, ...]
    reason: str = ""
    """Why, where it is not as in the paper: what was tested."""


def heads(ours: str, theirs: str, metric: str = "AP") -> Measure:
    return lambda record: paired(of_heads(record, ours, metric), of_heads(record, theirs, metric))


def runs(ours: str, theirs: str, metric: str = "AP") -> Measure:
    return lambda record: paired(of_runs(record, ours, metric), of_runs(record, theirs, metric))


def alone(ours: str, theirs: str, paper: float, metric: str = "AP") -> Test:
    """Heads alone on generated shapes."""
    return Test(f"{metric}, heads alone", HEADS, heads(ours, theirs, metric), paper)


def narrow(ours: str, theirs: str, paper: float, metric: str = "AP") -> Test:
    """The same with a narrow fc-head."""
    return Test(f"{metric}, the same, narrow fc-head", NARROW, heads(ours, theirs, metric), paper)


def longer(ours: str, theirs: str, paper: float) -> Test:
    """Heads alone after twice as many RoIs."""
    return Test("AP, the same, twice as long", LONGER, heads(ours, theirs), paper)


def everywhere(ours: str, theirs: str, paper: float, metric: str = "AP") -> tuple[Test, ...]:
    """Whole trainings on BCCD, and heads alone."""
    kinds = (ours, theirs, paper, metric)
    return Test(f"{metric}, BCCD", "bccd", runs(ours, theirs, metric), paper), alone(*kinds), narrow(*kinds)


def read_out(words: str, ours: dict[str, str], theirs: dict[str, str], paper: float | None = None) -> Test:
    """Two ways to read out one Ext."""
    ext = "double_head_ext"
    return Test(
        words, HEADS, lambda one: paired(of_heads(one, ext, "AP", **ours), of_heads(one, ext, "AP", **theirs)), paper
    )


def fused(fusion: str) -> dict[str, str]:
    return {"readout": "fused", "fusion": fusion}


def windows(words: str, ours: str, theirs: str, name: str, low: float, high: float, record: str = HEADS) -> Test:
    """A mean over sliding windows of an IoU from `low` to `high`."""
    return Test(words, record, lambda one: paired(
        over_windows(one, ours, name, low, high), over_windows(one, theirs, name, low, high)), digits=3)  # fmt: skip


def rise(record: Record, head: str) -> Seeds:
    """How much a score grows from windows of an IoU of 0.4 .. 0.6 to those of 0.8 .. 1."""
    best, middle = (over_windows(record, head, "score", *bins) for bins in ((0.8, 1.0), (0.4, 0.6)))
    return {seed: best[seed] - middle[seed] for seed in best.keys() & middle.keys()}


def rises(words: str, record: str) -> Test:
    return Test(words, record, lambda one: paired(rise(one, FC), rise(one, CONV)), digits=3)


def correlates(boxes: str) -> Test:
    return Test(f"Pearson, {boxes}", "pearson", lambda one: correlation(one, "fc alone", "conv alone", boxes), digits=3)


FC, CONV, EXT_FC, EXT_CONV = "fc: both", "conv: both", "double_head_ext fc", "double_head_ext conv"
IOU = "regressed_iou"
FINDINGS = (
    Finding("Double-Head beats the single fc-head", "Tables 1, 4",
            (*everywhere("double_head", "fc", 3.0), longer("double_head", "fc", 3.0),
             *everywhere("double_head", "fc", 3.2, "AP75")),
            "The miniature's fc-head has eight times the conv-head's weights, the paper's 1.8 times: with one that "
            "narrow it appears, and two fc-heads gain more. With the wide one the gap closes as RoIs are seen. Not "
            "a fault that the checks find, nor norms that lag. BCCD: not more AP in three times the steps."),
    Finding("Double-Head beats two fc-heads", "Table 1",
            (*everywhere("double_head", "double_fc", 1.4), longer("double_head", "double_fc", 1.4)),
            "Heads alone: the fc-head for boxes alone, wide or narrow, regresses better than the conv-head for boxes "
            "alone, by less the more RoIs were seen."),
    Finding("Ext beats Double-Head", "Table 4", everywhere("double_head_ext", "double_head", 0.5),
            "Heads alone: with a wide fc-head, fusion adds nothing to its classes and the conv-head's boxes (below)."),
    Finding("Ext beats the single fc-head", "Table 4", everywhere("double_head_ext", "fc", 3.5),
            "As for Double-Head."),
    Finding("Two fc-heads beat one", "Table 1", everywhere("double_fc", "fc", 1.3),
            "A wide fc-head has room for both tasks; a narrow one gains most by a second."),
    Finding("A single fc-head beats a single conv-head", "Table 1",
            (alone("fc", "conv", 0.9), narrow("fc", "conv", 0.9)),
            "A narrow fc-head is no better than the conv-head."),
    Finding("One conv-head beats two", "Table 1", (alone("conv", "double_conv", 1.6),),
            "Two conv-heads have twice the weights of one, and here tasks gain by heads of their own, as with narrow "
            "fc-heads. Wider conv-heads for both tasks were not tested."),
    Finding("The single fc-head beats the reversed double head", "Table 1", (alone("fc", "double_head_reverse", 4.8),),
            "Its conv-head scores good windows lower; but here its fc-head for boxes alone regresses better than a "
            "shared one, which nearly makes up for it."),
    Finding("Fusing the classifiers helps", "Table 3",
            (read_out("AP, complementary - none", fused("complementary"), fused("none"), 0.6),),
            "Ext's conv-head scores good windows lower than the fc-head does."),
    Finding("Complementary fusion beats the average", "Table 3",
            (read_out("AP", fused("complementary"), fused("average"), 0.2),)),
    Finding("Two heads beat either alone", "Figure 6", (
        read_out("AP, fc classes with conv boxes - fc", {"readout": "split"}, {"readout": "fc"}),
        read_out("AP, the same - conv", {"readout": "split"}, {"readout": "conv"})),
            "Ext's conv-head regresses windows only a little better than its fc-head (below), and AP does not follow."),
    Finding("The conv-head regresses better boxes", "Figure 2", (
        windows("IoU, windows of 0.5 .. 1, heads for both tasks", CONV, FC, IOU, 0.5, 1.0),
        windows("the same, narrow fc-head", CONV, FC, IOU, 0.5, 1.0, NARROW),
        windows("the same, heads for boxes alone", "conv: boxes", "fc: boxes", IOU, 0.5, 1.0),
        windows("the same, narrow fc-head", "conv: boxes", "fc: boxes", IOU, 0.5, 1.0, NARROW),
        windows("the same, the heads of one Ext", EXT_CONV, EXT_FC, IOU, 0.5, 1.0),
        windows("the same, narrow fc-head", EXT_CONV, EXT_FC, IOU, 0.5, 1.0, NARROW),
        windows("IoU, windows of 0 .. 0.5, heads for both tasks", CONV, FC, IOU, 0.0, 0.5)),
            "Heads of their own: the gap shrinks with every doubling of RoIs, and is smaller against a narrow fc-head. "
            "In one Ext the fc-head has less of the task (its weight is 0.3 against 0.8)."),
    Finding("fc-scores rise more with the windows' IoU", "Figure 2",
            (rises("score of 0.8 .. 1 - of 0.4 .. 0.6", HEADS), rises("the same, narrow fc-head", NARROW))),
    Finding("fc-scores correlate more with IoUs", "Figure 3",
            tuple(correlates(boxes) for boxes in ("windows", "proposals", "detections"))),
    Finding("Ext's conv-head regresses better than a single conv-head", "Figure 7",
            (windows("IoU, windows of 0.5 .. 1", EXT_CONV, CONV, IOU, 0.5, 1.0),)),
    Finding("Ext's conv-head classifies better than a single conv-head", "Figure 7",
            (windows("score, windows of 0.8 .. 1", EXT_CONV, CONV, "score", 0.8, 1.0),),
            "In an Ext it has a fifth of the classification loss. With three fifths its classes are better: AP50 alone "
            "rises (Figure 6's record, l_conv 0.4 for 0.8)."),
)  # fmt: skip
"""The paper compares Double-Head with the single head and Ext at 39.8 AP (Table 4: K = 5 with non-local blocks), and
with two fc-heads at 39.5 (Table 1: K = 5 without)."""
