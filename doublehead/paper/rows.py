"""The rows of the paper's Tables 1 to 6, copied from it, and the recipe of each."""

from __future__ import annotations

from .others import TABLE_5_OTHERS
from .schema import Row, Table

SIX = ("AP", "AP50", "AP75", "APs", "APm", "APl")
THREE = SIX[:3]

TABLE_2_PARAMETERS = (None, 1.06, 2.13, 3.19, 4.25, 5.31, 6.38, 7.44, 4.13, 7.19, 10.25)
"""The conv-head's parameters in each row, in M = 2^20; None: the FPN baseline, which has no conv-head."""


def _row(label: str, recipe: str, published: str, miniature: str | None = None, fusion: str | None = None) -> Row:
    return Row(label, recipe, tuple(float(number) for number in published.split("/")), miniature, fusion)


TABLES: dict[int, Table] = {
    1: Table(
        "Single and double heads (ResNet-50 FPN, COCO val2017)",
        SIX,
        (
            _row("single fc", "faster-rcnn-r50-fpn", "36.8/58.7/40.4/21.2/40.1/48.8", "miniature-fc"),
            _row("single conv", "conv-head-r50-fpn", "35.9/54.0/39.6/19.1/39.4/50.2", "miniature-conv"),
            _row("double-fc", "double-fc-unweighted-r50-fpn", "37.3/58.7/40.4/21.5/40.1/49.3"),
            _row("double-conv", "double-conv-unweighted-r50-fpn", "33.8/50.5/37.1/16.4/37.2/49.3"),
            _row("double-head-reverse", "double-head-reverse-unweighted-r50-fpn", "32.6/50.5/35.7/16.2/36.8/46.5"),
            _row("double-head", "double-head-k5-unweighted-r50-fpn", "38.8/58.9/42.3/22.1/42.2/51.3"),
            _row("double-fc, weighted", "double-fc-r50-fpn", "38.1/59.4/41.3/21.5/41.1/50.0", "miniature-double-fc"),
            _row("double-conv, weighted", "double-conv-r50-fpn", "34.3/51.0/38.0/16.4/38.0/49.0",
                 "miniature-double-conv"),
            _row("double-head-reverse, weighted", "double-head-reverse-r50-fpn", "32.0/48.8/35.2/14.9/35.2/47.6",
                 "miniature-double-head-reverse"),
            _row("double-head, weighted", "double-head-k5-r50-fpn", "39.5/59.6/43.2/22.7/42.3/52.1",
                 "miniature-double-head"),
        ),
        "Conv-heads of five residual blocks, none non-local; weighted: losses of the fc-head x 2.0, of the conv-head "
        "x 2.5.",
    ),
    2: Table(
        "Number of blocks in the conv-head (Double-Head, ResNet-50 FPN, COCO val2017)",
        THREE,
        (
            _row("K = 0 (FPN)", "faster-rcnn-r50-fpn", "36.8/58.7/40.4"),
            _row("K = 1", "double-head-k1-r50-fpn", "36.7/59.3/39.6"),
            _row("K = 2", "double-head-k2-r50-fpn", "38.7/59.2/41.9"),
            _row("K = 3", "double-head-k3-r50-fpn", "39.2/59.4/42.5"),
            _row("K = 4", "double-head-k4-r50-fpn", "39.3/59.2/42.9"),
            _row("K = 5", "double-head-k5-r50-fpn", "39.5/59.6/43.2"),
            _row("K = 6", "double-head-k6-r50-fpn", "39.5/59.4/43.3"),
            _row("K = 7", "double-head-k7-r50-fpn", "39.7/59.8/43.2"),
            _row("K = 3, non-local", "double-head-nl3-r50-fpn", "38.8/59.2/42.4"),
            _row("K = 5, non-local", "double-head-r50-fpn", "39.8/59.6/43.6"),
            _row("K = 7, non-local", "double-head-nl7-r50-fpn", "40.0/59.9/43.7"),
        ),
        "Parameters: weights of the conv-head's convolutions, M is 2^20; ours are counted from the recipe's own heads.",
        parameters=TABLE_2_PARAMETERS,
    ),
    3: Table(
        "Fusion of the two classifiers (Double-Head-Ext, ResNet-50 FPN, COCO val2017)",
        THREE,
        tuple(
            _row(label, f"double-head-ext{name}-r50-fpn", published, "miniature-double-head-ext", fusion)
            for label, name, published, fusion in (
                ("none (fc-head's)", "-none", "39.7/59.5/43.4", "none"),
                ("max", "-max", "39.9/59.7/43.7", "max"),
                ("average", "-average", "40.1/59.8/44.1", "average"),
                ("complementary", "", "40.3/60.3/44.2", "complementary"),
            )
        ),
        "One training, read out in four ways: doublehead evaluate RUN --fusions none max average "
        "complementary --metrics RUN/metrics-fusions.json",
    ),
    4: Table(
        "Against the baselines (COCO val2017)",
        SIX,
        (
            _row("Faster R-CNN, R50-C4", "faster-rcnn-r50-c4", "34.8/55.8/37.0/19.1/38.8/48.2"),
            _row("FPN baseline, R50", "faster-rcnn-r50-fpn", "36.8/58.7/40.4/21.2/40.1/48.8", "miniature-fc"),
            _row("Double-Head, R50", "double-head-r50-fpn", "39.8/59.6/43.6/22.7/42.9/53.1", "miniature-double-head"),
            _row("Double-Head-Ext, R50", "double-head-ext-r50-fpn", "40.3/60.3/44.2/22.4/43.3/54.3",
                 "miniature-double-head-ext"),
            _row("Faster R-CNN, R101-C4", "faster-rcnn-r101-c4", "38.5/59.4/41.4/19.7/43.1/53.3"),
            _row("FPN baseline, R101", "faster-rcnn-r101-fpn", "39.1/61.0/42.4/22.2/42.5/51.0"),
            _row("Double-Head, R101", "double-head-r101-fpn", "41.5/61.7/45.6/23.8/45.2/54.9"),
            _row("Double-Head-Ext, R101", "double-head-ext-r101-fpn", "41.9/62.4/45.9/23.9/45.2/55.8"),
        ),
    ),
    5: Table(
        "COCO test-dev",
        SIX,
        (_row("Double-Head-Ext, R101", "double-head-ext-r101-fpn", "42.3/62.8/46.3/23.9/44.9/54.3"),),
        "Scored by COCO's server: doublehead evaluate RUN --data.val-split test-dev2017 --out results.json. "
        'Its numbers are shown from RUN/metrics-test-dev.json: {"data": {"val_split": "test-dev2017"}, "AP": 0.42, '
        '"AP50": ...}.',
        split="test-dev2017",
        others=TABLE_5_OTHERS,
    ),
    6: Table(
        "Pascal VOC 2007 (trainval -> test, ResNet-50 FPN)",
        THREE,
        (
            _row("FPN baseline", "faster-rcnn-r50-fpn-voc07", "47.4/75.7/41.9"),
            _row("Double-Head-Ext", "double-head-ext-r50-fpn-voc07", "49.2/76.7/45.6"),
        ),
        "COCO-style AP; the paper gives no schedule, the recipes' is ours. Difficult objects are COCO's crowds here: "
        "they are not missed, and a detection is left out of the count that matches no other object and has enough of "
        "its own area (the IoU threshold) inside one. The paper does not say how it counts them.",
    ),
}  # fmt: skip


def rows_of(recipe: str) -> list[tuple[int, Row]]:
    """The rows that `recipe` reproduces, each with the number of its table."""
    return [(number, row) for number, table in TABLES.items() for row in table.rows if row.recipe == recipe]
