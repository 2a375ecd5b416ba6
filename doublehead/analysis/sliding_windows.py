"""Figures 2 and 7: classification scores and regressed boxes' IoUs over the IoUs of sliding windows.

Every object has 14,161 windows (see `windows`), each with the object's class.  They are grouped into 20 bins by their
IoU with the object.  For each bin and group of objects, the figure shows the mean of the class's score, and of the
object's IoU with the window after regression, with its standard error over pictures (see `jackknife`; windows are not
independent), or over seeds where a head has several.  The table also has the (population) standard deviation over
windows.

All heads see the same windows.  So a second table and figure show, for every two heads, the difference of their means
with its paired standard error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from doublehead.analysis.groups import SIZES, Group
from doublehead.analysis.jackknife import CLUSTERS, Estimate, Sample, Samples, estimate
from doublehead.analysis.moments import Moments, MomentTable
from doublehead.analysis.options import SlidingWindows
from doublehead.analysis.readers import ImageFeatures, Reader
from doublehead.analysis.record import Rows, describe_study, write_tables
from doublehead.analysis.shared_reading import read_each, shared_features
from doublehead.analysis.study import Study, open_study
from doublehead.analysis.windows import BINS, ObjectWindows, iou_bins, object_windows
from doublehead.analysis.windows_figure import Curve, Point, draw, draw_differences
from doublehead.data import Target
from doublehead.engine.distributed import World
from doublehead.engine.logs import say
from doublehead.ops import box_iou

FIGURE = "sliding-windows"
DIFFERENCES = f"{FIGURE}-differences"
_PLACE = ("group", "bin low", "bin high", "windows")
COLUMNS = (
    "head", *_PLACE, "score mean", "score std", "score se", "score se seeds",
    "iou mean", "iou std", "iou se", "iou se seeds", "seeds",
)  # fmt: skip
DIFFERENCE_COLUMNS = (
    "head", "minus", *_PLACE, "score difference", "score se", "score se seeds",
    "iou difference", "iou se", "iou se seeds", "seeds",
)  # fmt: skip


def run(options: SlidingWindows, world: World) -> None:
    """Draw the figure; see `SlidingWindows`.

    Raises:
        UserError: an option is invalid (see `open_study`), or `out` holds the state of another measurement.
        DataError: the data cannot be used.
    """
    study = open_study(FIGURE, options, world)
    table = study.measure(measure_image, options, _shape(study), world)
    world.on_main(lambda: write_results(study, table))


def measure_image(study: Study, options: SlidingWindows, image: Tensor, target: Target) -> tuple[MomentTable, int]:
    """Moments of an image's windows for all heads, by (head, class, size, bin, cluster), and the number of RoIs."""
    table = MomentTable(_shape(study))
    windows = object_windows(image, target, options.seed)
    if len(windows.boxes) == 0:
        return table, 0
    labels = target["labels"].to(image.device)[windows.objects]
    sizes = study.sizes[target["image_id"]].to(image.device)[windows.objects]
    cells = (labels - 1, sizes, iou_bins(windows.ious), study.cluster(target["image_id"]))
    features = shared_features(study.readers, image, target["boxes"])
    found = read_windows(study.readers, features, target["boxes"], windows, labels, options.chunk)
    for head, (scores, ious) in enumerate(found):
        table.add((head, *cells), scores, ious)
    return table, len(study.readers) * len(labels)


def read_windows(
    readers: Sequence[Reader],
    features: Sequence[ImageFeatures],
    objects: Tensor,
    windows: ObjectWindows,
    labels: Tensor,
    chunk: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each reader the score of each window's class in `labels` [K], and its object's IoU with the regressed box.

    IoUs, `Tensor[K]`, are computed in the image's pixels, like those of the windows with the objects `Tensor[G, 4]`.
    """
    for own, reading in zip(features, read_each(readers, features, windows.boxes, labels, chunk), strict=True):
        truth = objects.to(reading.boxes.device)[windows.objects]
        ious = box_iou(own.into_image(reading.boxes)[:, None], truth[:, None])[:, 0, 0].clamp(0, 1)
        yield reading.scores, ious


def write_results(study: Study, table: MomentTable) -> None:
    """Write the tables, the record and the figures, and print which groups are empty."""
    every = Samples(table)
    samples = [{group.name: _samples(every, head, group) for group in study.groups} for head in range(table.shape[0])]
    groups = [group.name for group in study.groups]
    curves = [
        Curve(name, None, group, [_point([(samples[k][group][b],) for k in readers]) for b in range(BINS)])
        for name, readers in study.heads.items()
        for group in groups
    ]
    differences = [
        Curve(head, minus, group, [
            _point([(samples[k][group][b], samples[j][group][b]) for k, j in pairs]) for b in range(BINS)
        ])
        for head, minus, pairs in study.pairs_of_heads()
        for group in groups
    ]  # fmt: skip
    for curve in curves[: len(groups)]:  # all heads share the windows
        if not curve.has_windows:
            say(f"{curve.group}: no objects, so nothing is drawn")
    where = f"{study.objects:,} objects, {len(study.sizes)} images of {study.dataset.name}"
    tables = [Rows(FIGURE, COLUMNS, [row for curve in curves for row in _rows(curve)])]
    if differences:
        rows = [row for curve in differences for row in _difference_rows(curve)]
        tables.append(Rows(DIFFERENCES, DIFFERENCE_COLUMNS, rows))
    files = write_tables(study.folder, FIGURE, tables, describe_study(study))
    files.append(draw(study.folder / f"{FIGURE}.png", curves, f"Sliding windows, {where}"))
    if shown := [curve for curve in differences if curve.minus == next(iter(study.heads))]:
        files.append(draw_differences(study.folder / f"{DIFFERENCES}.png", shown, f"Sliding windows, {where}"))
    say(f"{study.folder}: {', '.join(files)}")


def _samples(every: Samples, head: int, group: Group) -> list[Sample]:
    """For each bin."""
    return [every.total(head, group.classes, _sized(group.sizes), b) for b in range(BINS)]


def _point(seeds: list[tuple[Sample, ...]]) -> Point:
    """One bin of a curve: of each seed the sample of a head, or those of two heads whose difference it is."""
    first = Moments()
    for samples in seeds:
        first = first.merge(samples[0].whole)
    windows = first.count // len(seeds)
    return Point(windows, estimate(seeds, _score), estimate(seeds, _iou), first.x_std, first.y_std, len(seeds))


def _score(head: Moments, minus: Moments | None = None) -> float | None:
    return _difference(head.x_mean, None if minus is None else minus.x_mean)


def _iou(head: Moments, minus: Moments | None = None) -> float | None:
    return _difference(head.y_mean, None if minus is None else minus.y_mean)


def _difference(mean: float | None, minus: float | None) -> float | None:
    """All heads have the same windows, so either both means are None or neither."""
    return mean if mean is None or minus is None else mean - minus


def _rows(curve: Curve) -> Iterator[tuple]:
    for place, p in _places(curve):
        yield curve.head, *place, *_numbers(p.score, p.score_std), *_numbers(p.iou, p.iou_std), p.seeds


def _difference_rows(curve: Curve) -> Iterator[tuple]:
    for place, p in _places(curve):
        yield curve.head, curve.minus, *place, *p.score, *p.iou, p.seeds


def _numbers(mean: Estimate, std: float | None) -> tuple:
    return mean.value, std, mean.error, mean.seed_error


def _places(curve: Curve) -> Iterator[tuple[tuple, Point]]:
    for b, point in enumerate(curve.points):
        yield (curve.group, b / BINS, (b + 1) / BINS, point.windows), point


def _shape(study: Study) -> tuple[int, ...]:
    return len(study.readers), len(study.dataset.classes), len(SIZES), BINS, CLUSTERS


def _sized(sizes: Sequence[int]) -> list[int]:
    return [size for size in sizes if size < len(SIZES)]  # every window has an object
