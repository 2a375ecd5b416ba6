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

Each correlation has a standard error over pictures (see `jackknife`), for boxes of one picture are not independent,
and over seeds where a head has several.  A second table has the difference for every two heads, with its paired
standard error.

Groups go by the object.  Crowd and difficult objects are left out; so a detection of one overlaps no object, and a
proposal that overlaps nothing else is background.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from doublehead.analysis.groups import UNMATCHED
from doublehead.analysis.jackknife import CLUSTERS, Sample, Samples, estimate
from doublehead.analysis.moments import Moments, MomentTable
from doublehead.analysis.options import Pearson
from doublehead.analysis.pearson_figure import Correlation, draw
from doublehead.analysis.readers import ImageFeatures, Reader
from doublehead.analysis.record import Rows, describe_study, write_tables
from doublehead.analysis.shared_reading import read_each, shared_features
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
DIFFERENCES = f"{FIGURE}-differences"
COLUMNS = ("head", "boxes", "group", "pairs", "pearson", "se", "se seeds", "seeds")
DIFFERENCE_COLUMNS = ("head", "minus", "boxes", "group", "difference", "se", "se seeds", "seeds")
LEAST_PAIRS = 3
"""The minimum number of pairs; any two pairs correlate perfectly."""


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
    """Moments of an image's boxes for all heads, by (head, kind, class, size, cluster), and the number of pairs."""
    device = image.device
    objects = Objects(
        target["boxes"].to(device), target["labels"].to(device), study.sizes[target["image_id"]].to(device)
    )
    windows = object_windows(image, target, options.seed)
    table, count, cluster = MomentTable(_shape(study)), 0, study.cluster(target["image_id"])
    every = shared_features(study.readers, image, target["boxes"])
    read = window_pairs(study.readers, every, objects, windows, options.chunk) if len(objects.boxes) else []
    for head, (reader, features) in enumerate(zip(study.readers, every, strict=True)):
        proposals = proposal_pairs(reader, features, objects, options.chunk, options.background == "include")
        found = {"detections": detection_pairs(reader.detect(image), objects), "proposals": proposals}
        if read:
            found["windows"] = read[head]
        for kind, pairs in found.items():
            table.add((head, KINDS.index(kind), pairs.labels - 1, pairs.sizes, cluster), pairs.scores, pairs.ious)
            count += len(pairs.scores)
    return table, count


def window_pairs(
    readers: Sequence[Reader],
    features: Sequence[ImageFeatures],
    objects: Objects,
    windows: ObjectWindows,
    chunk: int,
) -> list[Pairs]:
    """For each reader all windows, each with its object."""
    labels, sizes = objects.labels[windows.objects], objects.sizes[windows.objects]
    readings = read_each(readers, features, windows.boxes, labels, chunk)
    return [Pairs(reading.scores, windows.ious, labels, sizes) for reading in readings]


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
    """Write the tables, the record and the figure, and print which bars are missing."""
    every = Samples(table)
    samples = {
        (head, kind, group.name): every.total(head, number, group.classes, group.sizes)
        for head in range(table.shape[0])
        for number, kind in enumerate(KINDS)
        for group in study.groups
    }
    places = [(kind, group.name) for kind in KINDS for group in study.groups]
    correlations = [
        correlate(name, kind, group, [samples[k, kind, group] for k in readers])
        for name, readers in study.heads.items()
        for kind, group in places
    ]
    for line in describe_gaps(correlations):
        say(line)
    rows = [(one.head, one.kind, one.group, one.pairs, *one.value, one.seeds) for one in correlations]
    tables = [Rows(FIGURE, COLUMNS, rows)]
    differences = [
        (head, minus, kind, group, *estimate([(samples[k, kind, group], samples[j, kind, group]) for k, j in pairs],
                                             _difference), len(pairs))
        for head, minus, pairs in study.pairs_of_heads()
        for kind, group in places
    ]  # fmt: skip
    if differences:
        tables.append(Rows(DIFFERENCES, DIFFERENCE_COLUMNS, differences))
    content = describe_study(study) | {"background": options.background}
    files = write_tables(study.folder, FIGURE, tables, content)
    title = f"Correlation of scores and boxes' IoUs, {study.objects:,} objects, {len(study.sizes)} images of "
    titles = TITLES | ({"proposals": WITH_BACKGROUND} if options.background == "include" else {})
    files.append(draw(study.folder / f"{FIGURE}.png", correlations, title + study.dataset.name, titles))
    say(f"{study.folder}: {', '.join(files)}")


def _correlation(moments: Moments) -> float | None:
    return moments.pearson if moments.count >= LEAST_PAIRS else None


def _difference(head: Moments, minus: Moments) -> float | None:
    ours, theirs = _correlation(head), _correlation(minus)
    return None if ours is None or theirs is None else ours - theirs


def describe_gaps(correlations: Sequence[Correlation]) -> list[str]:
    """A line for each missing bar, or one line for a group without objects."""
    lines = []
    for group in dict.fromkeys(one.group for one in correlations):
        mine = [one for one in correlations if one.group == group]
        if not any(one.pairs for one in mine):
            lines.append(f"{group}: no objects, so no bars")
            continue
        for gap in (one for one in mine if one.value.value is None):
            why = "too few pairs" if gap.pairs < LEAST_PAIRS * gap.seeds else "scores or IoUs do not vary"
            lines.append(f"{group}: no bar for {gap.head}'s {gap.kind}: {why} ({gap.pairs})")
    return lines


def correlate(head: str, kind: str, group: str, seeds: Sequence[Sample]) -> Correlation:
    """The bar for the pairs of each seed, whose x are scores and y are IoUs."""
    pairs = sum(one.whole.count for one in seeds)
    return Correlation(head, kind, group, pairs, estimate([(one,) for one in seeds], _correlation), len(seeds))


def _shape(study: Study) -> tuple[int, ...]:
    return len(study.readers), len(KINDS), len(study.dataset.classes), UNMATCHED + 1, CLUSTERS
