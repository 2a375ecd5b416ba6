"""Which gate of a Double-Head-Ext loses how much AP, and which one to choose.

A gate (`DetectionConfig.ext_gate`) drops RoIs by the fc-head's score alone, before the conv-head sees them.  How much
of that is free depends on the weights and on the pictures, so it is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

from doublehead.engine.coco_metrics import compute_metrics
from doublehead.engine.distributed import World
from doublehead.engine.evaluator import Output, coco_results, inference, predict_share, rois_of_the_box_head
from doublehead.errors import UserError

if TYPE_CHECKING:
    from doublehead.models import DoubleHeadRCNN
    from doublehead.models.readout import ReadOut

GATES = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8,
    0.9,
)  # fmt: skip
"""The gates that are tried."""
_EQUAL = 1e-9  # AP points: a loss is within a bound that it equals


class GatePoint(NamedTuple):
    """What a gate does on some images."""

    gate: float
    """0: none."""
    survivors: float
    """Share of the RoIs that the conv-head sees, 0 .. 1."""
    ap: float
    """COCO's AP, 0 .. 1."""
    loss: float
    """AP points (0 .. 100) below the AP without a gate; negative: above it."""


class GateCurve(NamedTuple):
    """Gates on the same images, in ascending order; the first is none, 0."""

    images: int
    points: list[GatePoint]

    def at(self, gate: float) -> GatePoint:
        """The point of a gate that was tried."""
        return next(point for point in self.points if point.gate == gate)

    def largest(self, most_loss: float) -> GatePoint | None:
        """The gate to choose: the last one before the first that loses more than `most_loss` AP points.

        AP does not fall evenly with the gate: behind a gate that loses too much another may lose little, by chance.
        It is not chosen: all gates below the chosen one keep the bound too.

        Returns:
            None: the smallest gate already loses more.
        """
        within = list(takewhile(lambda point: point.loss <= most_loss + _EQUAL, self.points[1:]))
        return within[-1] if within else None


def measure_gates(
    model: DoubleHeadRCNN,
    dataset: Any,
    readout: ReadOut,
    gates: Sequence[float] = GATES,
    world: World | None = None,
    *,
    held_out: bool = False,
    workers: int = 0,
    progress: bool = False,
) -> list[GateCurve]:
    """Measure gates in one pass over the images: the heads run once on all RoIs, and every gate is judged from that.

    So the AP are, up to rounding of the conv-head, those of `evaluate` with that gate (see
    `doublehead.models.inference.judge_gates`).

    Args:
        model: a Double-Head-Ext on `world.device`.
        dataset: a `DetectionDataset` with boxes to find.
        readout: a fused one, as `Detector.resolve_readout` gives it.
        gates: ascending, each above 0 and below 1.
        world: the processes; None: this one, on the model's device.
        held_out: measure the first and the second half of the images apart.
        workers, progress: as for `evaluate`.

    Returns:
        One curve, of all images; with `held_out` two, of each half.  The same on every process.

    Raises:
        UserError: there is nothing to find on the images, or on one half of them, or none of it is found.
    """
    world = world or World(device=next(model.parameters()).device)
    tried = (0.0, *gates)
    with inference(model):
        mine = predict_share(
            lambda images: list(zip(*model.detect_gates(images, readout, tried), strict=True)),
            dataset, world, workers, progress,
        )  # fmt: skip
    shares = world.gather_on_main(mine)

    def measure() -> list[GateCurve]:
        outputs = {image_id: each for share in shares for image_id, each in share.items()}
        return [_curve(outputs, part, tried) for part in _parts(dataset, held_out)]

    return world.on_main(measure)


class _Part:
    """Some images of a data set, for the metrics."""

    def __init__(self, dataset: Any, image_ids: Sequence[int]) -> None:
        self.name, self.image_ids = dataset.name, list(image_ids)
        self.classes, self.category_ids = dataset.classes, dataset.category_ids
        truth, known = dataset.coco_ground_truth(), set(image_ids)
        annotations = [entry for entry in truth["annotations"] if entry["image_id"] in known]
        self.truth = truth | {"annotations": annotations}

    def __len__(self) -> int:
        return len(self.image_ids)


def _parts(dataset: Any, held_out: bool) -> list[_Part]:
    """All images, or both halves, one behind the other: neighbours in a folder may show the same scene."""
    ids = list(dataset.image_ids)
    half = (len(ids) + 1) // 2
    parts = [_Part(dataset, chosen) for chosen in ([ids[:half], ids[half:]] if held_out else [ids])]
    for part, which in zip(parts, ("the first half of ", "the second half of ") if held_out else ("",), strict=True):
        if not part.truth["annotations"]:
            hint = ": leave --held-out out" if held_out else ", so no AP can be measured: give images with boxes"
            raise UserError(f"{which}{dataset.name} ({len(part)} images) has no object to find{hint}")
    return parts


def _curve(outputs: dict[int, tuple[Output, ...]], part: _Part, gates: Sequence[float]) -> GateCurve:
    points, known = [], {}
    for number, gate in enumerate(gates):
        mine = {image_id: outputs[image_id][number] for image_id in part.image_ids}
        kept = sum(int(output["box_rois"]) for output in mine.values())
        if kept not in known:  # of fewer RoIs or as many: the same ones
            known[kept] = compute_metrics(part.truth, coco_results(mine, part), part, voc=False)["AP"]
        share, ap = rois_of_the_box_head(mine)["box_rois"]["share"], known[kept] or 0.0
        if not points and ap == 0:
            raise UserError(
                f"on {part.name} ({len(part)} images) the detector has AP 0 without a gate: there is none to keep"
            )
        points.append(GatePoint(gate, share, ap, 100 * (points[0].ap - ap) if points else 0.0))
    return GateCurve(len(part), points)


def format_curve(curve: GateCurve, chosen: float | None = None) -> str:
    """The curve as a small table; `*` marks the chosen gate."""
    lines = [f"{'gate':>6}  survivors     AP   loss"]
    for point in curve.points:
        mark = " *" if point.gate == chosen else ""
        gate = f"{point.gate:g}" if point.gate else "none"
        loss = round(point.loss, 2) + 0.0  # no -0.00
        lines.append(f"{gate:>6}  {100 * point.survivors:7.1f} %  {100 * point.ap:5.2f}  {loss:5.2f}{mark}")
    return "\n".join(lines)
