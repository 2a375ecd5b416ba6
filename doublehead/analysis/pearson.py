"""Figure 3: Pearson's correlation between classification scores and boxes' IoUs, for three kinds of boxes.

Each pair is the score x and the IoU y of one box.  IoUs are computed in the image's pixels.

- windows: the sliding windows of every object (see `windows`).  x is the score of the object's class, y the window's
  own IoU with the object, before regression.
- proposals: RPN proposals that overlap an object.  Each is assigned to the object that it overlaps most; x is the score
  of that object's class, y the proposal's own IoU with it, before regression.
- detections: the final detections, after NMS.  x is the detection's score, y the regressed box's IoU with the object of
  its class that it overlaps most.  A detection that overlaps none has IoU 0 and counts in the group "all" only.

The paper's "all proposals" may include those that overlap no object: background, most of what an RPN proposes.  They
have no object, hence no class to take the score of.  `--background leave-out` ignores them.  `--background include`
treats each like a detection of nothing: x is its highest score of any class, y is 0, and it counts in the group "all"
only.

Groups go by the object.  Crowd and difficult objects are left out; so a detection of one overlaps no object, and a
proposal that overlaps nothing else is background.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from doublehead.analysis.groups import UNMATCHED
from doublehead.analysis.moments import Moments, MomentTable
from doublehead.analysis.options import Pearson
from doublehead.analysis.output import save_figure, write_csv
from doublehead.analysis.readers import ImageFeatures, Reader, shared_features
from doublehead.analysis.study import Study, open_study
from doublehead.analysis.windows import ObjectWindows, object_windows
from doublehead.data import Target
from doublehead.engine.distributed import World
from doublehead.engine.logs import say
from doublehead.ops import box_iou

FIGURE = "pearson"
KINDS = ("windows", "proposals", "detections")
TITLES = {
    "windows": "sliding windows: score of the object's class, the window's own IoU",
    "proposals": "RPN proposals that overlap an object: score of its class, the proposal's own IoU",
    "detections": "detections after NMS: their score, the regressed box's IoU or 0 without an object of its class",
}
WITH_BACKGROUND = "all RPN proposals: score of the object's class, the proposal's own IoU; for background the best, 0"
COLUMNS = ("head", "boxes", "group", "pairs", "pearson")
LEAST_PAIRS = 3
"""The minimum number of pairs; any two pairs correlate perfectly."""
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "ooo", "---", "+++")


class Pairs(NamedTuple):
    """A head's scores and IoUs for the boxes of one kind in one image."""

    scores: Tensor
    """`Tensor[K]`."""
    ious: Tensor
    """`Tensor[K]`, in [0, 1]."""
    labels: Tensor
    """`Tensor[K]`, int64, from 1."""
    sizes: Tensor
    """`Tensor[K]`, int64: the object's size index, or `UNMATCHED`."""


class Correlation(NamedTuple):
    """One bar of the figure."""

    head: str
    kind: str
    group: str
    pairs: int
    value: float | None
    """Pearson's correlation; None: too few pairs, or scores or IoUs do not vary."""


class Objects(NamedTuple):
    """The ground truth of an image, on the device."""

    boxes: Tensor
    """`Tensor[G, 4]`, the image's pixels."""
    labels: Tensor
    """`Tensor[G]`, int64, from 1."""
    sizes: Tensor
    """`Tensor[G]`, int64."""


def run(options: Pearson, world: World) -> None:
    """Draw the figure; see `Pearson`.

    Raises:
        UserError: an option is invalid (see `open_study`), or `out` holds the state of another measurement.
        DataError: the data cannot be used.
    """
    study = open_study(FIGURE, options, world, background=options.background)
    table = study.measure(measure_image, options, _shape(study), world)
    world.on_main(lambda: write_results(study, table, options))


def measure_image(study: Study, options: Pearson, image: Tensor, target: Target) -> tuple[MomentTable, int]:
    """Moments of an image's boxes for all heads, by (head, kind, class, size), and the number of pairs."""
    device = image.device
    objects = Objects(
        target["boxes"].to(device), target["labels"].to(device), study.sizes[target["image_id"]].to(device)
    )
    windows = object_windows(image, target, options.seed)
    table, count = MomentTable(_shape(study)), 0
    for head, (reader, features) in enumerate(
        zip(study.readers, shared_features(study.readers, image, target["boxes"]), strict=True)
    ):
        proposals = proposal_pairs(reader, features, objects, options.chunk, options.background == "include")
        found = {"detections": detection_pairs(reader.detect(image), objects), "proposals": proposals}
        if len(objects.boxes):
            found["windows"] = window_pairs(reader, features, objects, windows, options.chunk)
        for kind, pairs in found.items():
            table.add((head, KINDS.index(kind), pairs.labels - 1, pairs.sizes), pairs.scores, pairs.ious)
            count += len(pairs.scores)
    return table, count


def window_pairs(
    reader: Reader, features: ImageFeatures, objects: Objects, windows: ObjectWindows, chunk: int
) -> Pairs:
    """All windows, each with its object."""
    boxes = reader.rois(features, windows.boxes)
    return _read_pairs(reader, features, objects, boxes, windows.ious, windows.objects, chunk)


def proposal_pairs(
    reader: Reader, features: ImageFeatures, objects: Objects, chunk: int, background: bool = False
) -> Pairs:
    """The proposals that overlap an object, each with the one it overlaps most; with `background` the others too."""
    proposals = reader.proposals(features)
    if len(objects.boxes):
        ious, nearest = box_iou(features.into_image(proposals), objects.boxes).clamp(0, 1).max(dim=1)
    else:
        ious, nearest = proposals.new_zeros(len(proposals)), objects.labels.new_zeros(len(proposals))
    overlaps = ious > 0
    pairs = _read_pairs(reader, features, objects, proposals[overlaps], ious[overlaps], nearest[overlaps], chunk)
    others = proposals[~overlaps]
    if not background or len(others) == 0:
        return pairs
    scores, labels = reader.best_classes(features, others, chunk)
    nothing = Pairs(scores, torch.zeros_like(scores), labels, torch.full_like(labels, UNMATCHED))
    return Pairs(*(torch.cat(columns) for columns in zip(pairs, nothing, strict=True)))


def detection_pairs(found: dict[str, Tensor], objects: Objects) -> Pairs:
    """Detections, each with the object of its class that it overlaps most, if there is one."""
    boxes, labels = found["boxes"], found["labels"]
    if len(objects.boxes) == 0 or len(boxes) == 0:
        return Pairs(found["scores"], torch.zeros_like(found["scores"]), labels, torch.full_like(labels, UNMATCHED))
    same = labels[:, None] == objects.labels
    ious, nearest = torch.where(same, box_iou(boxes, objects.boxes), 0).clamp(0, 1).max(dim=1)
    return Pairs(found["scores"], ious, labels, torch.where(ious > 0, objects.sizes[nearest], UNMATCHED))


def _read_pairs(
    reader: Reader, features: ImageFeatures, objects: Objects, boxes: Tensor, ious: Tensor, matched: Tensor, chunk: int
) -> Pairs:
    labels = objects.labels[matched]
    scores = reader.read_all(features, boxes, labels, chunk).scores if len(boxes) else ious
    return Pairs(scores, ious, labels, objects.sizes[matched])


def write_results(study: Study, table: MomentTable, options: Pearson) -> None:
    """Write `pearson.csv` and `pearson.png`, and print which bars are missing."""
    correlations = [
        correlate(reader.name, kind, group.name, table.total(head, number, group.classes, group.sizes))
        for head, reader in enumerate(study.readers)
        for number, kind in enumerate(KINDS)
        for group in study.groups
    ]
    for line in describe_gaps(correlations):
        say(line)
    write_csv(study.folder / f"{FIGURE}.csv", COLUMNS, correlations)
    title = f"Correlation of scores and boxes' IoUs, {len(study.dataset)} images of {study.dataset.name}"
    draw(study.folder / f"{FIGURE}.png", correlations, title, options.background == "include")
    say(f"{study.folder}: {FIGURE}.csv, {FIGURE}.png")


def describe_gaps(correlations: Sequence[Correlation]) -> list[str]:
    """A line for each missing bar, or one line for a group without objects."""
    lines = []
    for group in dict.fromkeys(one.group for one in correlations):
        mine = [one for one in correlations if one.group == group]
        if not any(one.pairs for one in mine):
            lines.append(f"{group}: no objects, so no bars")
            continue
        for gap in (one for one in mine if one.value is None):
            why = "too few pairs" if gap.pairs < LEAST_PAIRS else "scores or IoUs do not vary"
            lines.append(f"{group}: no bar for {gap.head}'s {gap.kind}: {why} ({gap.pairs})")
    return lines


def correlate(head: str, kind: str, group: str, moments: Moments) -> Correlation:
    """The bar for some moments, whose x are scores and y are IoUs."""
    value = moments.pearson if moments.count >= LEAST_PAIRS else None
    return Correlation(head, kind, group, moments.count, value)


def draw(path: Path, correlations: Sequence[Correlation], title: str, background: bool = False) -> None:
    """Three panels, one below the other, with a cluster of bars for each group and a bar for each head."""
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys(one.group for one in correlations))
    heads = list(dict.fromkeys(one.head for one in correlations))
    width = 0.8 / len(heads)
    figure = Figure(figsize=(max(8, 1.2 + 0.25 * len(groups) * (len(heads) + 1)), 8.6), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True, sharey=True)
    titles = TITLES | ({"proposals": WITH_BACKGROUND} if background else {})
    for axes, (kind, name) in zip(panels, titles.items(), strict=True):
        for number, head in enumerate(heads):
            values = [one.value for one in correlations if (one.head, one.kind) == (head, kind)]
            positions = [group + (number - (len(heads) - 1) / 2) * width for group in range(len(groups))]
            _draw_bars(axes, positions, values, width, number, head)
        axes.set_xticks(range(len(groups)), [group.replace(" ", "\n") for group in groups])
        axes.set_title(name, fontsize="medium")
        axes.set(xlim=(-0.6, len(groups) - 0.4), ylabel="Pearson's correlation")
        axes.axhline(0, color="black", lw=0.8)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    panels[0].margins(y=0.16)  # for the numbers
    figure.suptitle(title)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save_figure(path, figure)


def _draw_bars(
    axes: Any, positions: list[float], values: list[float | None], width: float, number: int, head: str
) -> None:
    heights = [math.nan if value is None else value for value in values]
    hatch = HATCHES[number % len(HATCHES)]
    bars = axes.bar(
        positions, heights, width, label=head, hatch=hatch, color=f"C{number}", alpha=0.75, edgecolor="black", lw=0.6
    )
    labels = ["gap" if value is None else f"{value:.2f}" for value in values]
    for bar, label in zip(bars, labels, strict=True):
        height = 0.0 if label == "gap" else bar.get_height()
        side = "top" if height < 0 else "bottom"
        axes.annotate(
            label, (bar.get_x() + width / 2, height), (0, -2 if height < 0 else 2), textcoords="offset points",
            ha="center", va=side, fontsize="x-small", rotation=90,
        )  # fmt: skip


def _shape(study: Study) -> tuple[int, ...]:
    return len(study.readers), len(KINDS), len(study.dataset.classes), UNMATCHED + 1
