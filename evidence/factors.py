"""Factors one at a time: their words, and the tables of how they change the heads and the gap between them."""

from __future__ import annotations

from paired import paired
from reading import Record, changed
from views import NUMBERS, compared, markdown, shown

from doublehead.analysis.heads.curves import of_heads
from doublehead.analysis.heads.specs import BASE

SGD = "train.optimizer=sgd,train.lr=0.02,train.weight_decay=1e-4,train.bias_lr_factor=2.0"
EVEN = "model.loss.w_fc=1.0,model.loss.w_conv=1.0"
WORDS = {
    BASE: "base",
    "model.roi.conv_box_scale=1.0": "boxes of the conv-head not enlarged by 1.3",
    EVEN: "loss weights 1.0 for 2.0 and 2.5",
    SGD: "SGD for AdamW",
    f"{SGD},{EVEN}": "SGD and loss weights 1.0",
    "model.head.conv_blocks=1": "K = 1 for 3",
    "model.head.conv_blocks=5": "K = 5 for 3",
    "model.head.non_local.enabled=false": "no non-local block",
    "model.head.conv_dim=256": "conv-head 256 wide for 128",
    "model.head.fc_dim=64": "fc-head 64 wide for 256",
    "train.accumulate=8": "norms of 64 RoIs for 512",
    "model.roi.samples=16": "16 RoIs an image for 64",
    "model.roi.samples=128": "128 RoIs an image for 64",
    "model.roi.positive_fraction=0.25": "a quarter positive for a half",
}
"""Variant -> what it changes, against the base of `factors` in run.sh."""


def words(variant: str) -> str:
    """A variant in words, or the fields that it changes."""
    return WORDS.get(variant, f"`{variant}`")


def factors(record: Record) -> str:
    """One factor at a time: both kinds, their gap, and what the factor changes, paired by seed."""
    rows = []
    base = {kind: of_heads(record, kind, "AP") for kind in ("fc", "double_head")}
    gap = {
        seed: base["double_head"][seed] - base["fc"][seed] for seed in base["double_head"].keys() & base["fc"].keys()
    }
    for variant in record["variants"]:
        fc, double = (changed(record, variant, kind, "AP") for kind in ("fc", "double_head"))
        mine = {seed: double[seed] - fc[seed] for seed in double.keys() & fc.keys()}
        first = compared(paired(double, fc))
        change = compared(paired(double, base["double_head"])) if variant != BASE else [""] * 6
        of_gap = compared(paired(mine, gap)) if variant != BASE else [""] * 6
        rows.append([words(variant), shown(fc), shown(double), *(first[column] for column in (0, 1, 3)),
                     *change[:2], *(of_gap[column] for column in (0, 1, 3))])  # fmt: skip
    header = ["", "single fc", "Double-Head", "Double-Head - fc", "s.e.", "95 %", "Double-Head - base's", "s.e.",
              "gap - base's", "s.e.", "95 %"]  # fmt: skip
    return markdown(header, rows)


def depth(record: Record) -> str:
    """Table 2: variants that change the conv-head's blocks alone; the base is among them."""
    rows = []
    for variant, changes in record["variants"].items():
        if not set(changes) <= {"model.head.conv_blocks", "model.head.non_local.enabled"}:
            continue
        fc = of_heads(record, "fc", "AP")
        double = {name: changed(record, variant, "double_head", name) for name in NUMBERS[:3]}
        rows.append([words(variant), *(shown(one) for one in double.values()), *compared(paired(double["AP"], fc))[:2]])
    return markdown(["Double-Head", *NUMBERS[:3], "AP - single fc", "s.e."], rows)
