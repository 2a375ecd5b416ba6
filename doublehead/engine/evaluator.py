"""Measures a detector: COCO's twelve numbers, AP per class, and VOC's AP where it applies.

Images go through the model one at a time.  In a padded batch the sizes of its neighbours would
change an image's border pixels, and so its detections; alone, an image gives the same detections
on any number of processes and in any order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from doublehead.engine.coco_metrics import CocoResults, Details, compute_metrics, detailed_metrics
from doublehead.engine.distributed import World
from doublehead.engine.metrics_text import COCO_NUMBERS

if TYPE_CHECKING:
    from doublehead.models.readout import ReadOut

__all__ = [
    "COCO_NUMBERS", "CocoResults", "Evaluation", "coco_results", "compute_metrics", "evaluate", "evaluate_each",
    "evaluate_in_detail", "inference", "predict", "predict_images", "predict_share", "rois_of_the_box_head",
    "watch_rois",
]  # fmt: skip
Output = dict[str, torch.Tensor]
"""An image's detections: boxes, labels, scores; from a `DoubleHeadRCNN` also rois and box_rois."""


class Evaluation(NamedTuple):
    """What `evaluate_in_detail` gives."""

    metrics: dict[str, Any]
    results: CocoResults
    details: Details | None
    """What the charts show; on the main process, and only where there is something to find."""


def evaluate(
    model: nn.Module,
    dataset: Any,
    world: World | None = None,
    *,
    voc: bool = False,
    workers: int = 0,
    progress: bool = False,
) -> tuple[dict[str, Any], CocoResults]:
    """Run `model` over `dataset` and measure its detections.

    Args:
        model: a detector on `world.device`; its training mode is restored afterwards.
        dataset: a `DetectionDataset`; each process takes its share of the images.
        world: the processes; None: this one, on the model's device.
        voc: also give VOC's AP at IoU 0.5 (see `voc_ap`).
        workers: loader processes.
        progress: show a bar.

    Returns:
        `(metrics, results)`.  `metrics` (the same on every process; in [0, 1], None where there is
        nothing to measure) has the names of `COCO_NUMBERS`, `classes` (name -> AP, AP50), `best_f1` (see
        `matching.best_f1`), `images`, `detections`, `box_rois` (see `rois_of_the_box_head`) and, with
        `voc`, `voc` (mAP50 and classes).  Without any ground-truth box, as in a test split, only the
        counts are there.
        `results` is COCO's submission format, in the data set's order, on the main process; empty
        on the others.
    """
    return evaluate_in_detail(model, dataset, world, voc=voc, workers=workers, progress=progress)[:2]


def evaluate_in_detail(
    model: nn.Module,
    dataset: Any,
    world: World | None = None,
    *,
    voc: bool = False,
    workers: int = 0,
    progress: bool = False,
) -> Evaluation:
    """`evaluate`, and what its charts need."""
    world = world or World(device=next(model.parameters()).device)
    mine = predict(model, dataset, world, workers=workers, progress=progress)
    shares = world.gather_on_main(mine)

    results: CocoResults = []
    details: list[Details | None] = [None]

    def measure() -> dict[str, Any]:
        outputs = {image_id: output for share in shares for image_id, output in share.items()}
        metrics, measured, details[0] = _measure(outputs, dataset, voc)
        results.extend(measured)
        return metrics

    return Evaluation(world.on_main(measure), results, details[0])


def evaluate_each(
    model: nn.Module,
    dataset: Any,
    readouts: dict[str, ReadOut],
    world: World | None = None,
    *,
    voc: bool = False,
    workers: int = 0,
    progress: bool = False,
) -> dict[str, dict[str, Any]]:
    """`evaluate` for several read-outs of one Ext model in one pass over the images.

    Args:
        model: a `DoubleHeadRCNN` on `world.device`.
        readouts: name -> what `Detector.resolve_readout` gave.
        world, voc, workers, progress: as for `evaluate`.

    Returns:
        Name -> metrics, the same on every process: to the bit those of `evaluate` after `set_readout`.
    """
    world = world or World(device=next(model.parameters()).device)
    with inference(model):
        mine = predict_share(
            lambda images: list(zip(*model.detect_each(images, list(readouts.values())), strict=True)),
            dataset, world, workers, progress,
        )  # fmt: skip
    shares = world.gather_on_main(mine)

    def measure() -> dict[str, dict[str, Any]]:
        gathered = {image_id: outputs for share in shares for image_id, outputs in share.items()}
        return {
            name: _measure({image_id: outputs[number] for image_id, outputs in gathered.items()}, dataset, voc).metrics
            for number, name in enumerate(readouts)
        }

    return world.on_main(measure)


def _measure(outputs: dict[int, Output], dataset: Any, voc: bool) -> Evaluation:
    results = coco_results(outputs, dataset)
    metrics, details = detailed_metrics(dataset.coco_ground_truth(), results, dataset, voc)
    return Evaluation(metrics | rois_of_the_box_head(outputs), results, details)


def predict(
    model: nn.Module, dataset: Any, world: World, *, workers: int = 0, progress: bool = False
) -> dict[int, Output]:
    """Detections of this process's share of `dataset`: image id -> boxes, labels, scores on the host."""
    with inference(model), watch_rois(model) as rois:

        def detect(images: list[torch.Tensor]) -> list[tuple[Output]]:
            outputs = model(images)
            return [(output | {name: v[row] for name, v in rois.items()},) for row, output in enumerate(outputs)]

        share = predict_share(detect, dataset, world, workers, progress)
    return {image_id: output for image_id, (output,) in share.items()}


def predict_share(
    detect: Callable[[list[torch.Tensor]], Sequence[tuple[Output, ...]]],
    dataset: Any,
    world: World,
    workers: int,
    progress: bool,
) -> dict[int, tuple[Output, ...]]:
    """Image id -> the outputs of `detect` for the image, on the host; for this process's share of the images.

    Args:
        detect: one image in a list -> in a list, the image's outputs, any number of them.
        dataset, world, workers, progress: as for `evaluate`.
    """
    from doublehead.data import build_loader

    loader = build_loader(
        dataset, 1, train=False, seed=0, rank=world.rank, world_size=world.size, workers=workers
    )  # fmt: skip
    total = -(-len(dataset) // world.size)
    bar = tqdm(loader, total=total, desc="evaluating", unit="image", leave=False, disable=None if progress else True)
    share = {}
    for images, targets in bar:
        each = detect([image.to(world.device) for image in images])
        for target, outputs in zip(targets, each, strict=True):
            # A share may repeat an image to be as long as the others: the same key, the same value.
            share[int(target["image_id"])] = tuple(
                {name: value.cpu() for name, value in output.items()} for output in outputs
            )
    return share


@contextlib.contextmanager
def watch_rois(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Holds `rois` and `box_rois` of the detector's last batch (see `Detections`); stays empty for other models."""
    seen: dict[str, torch.Tensor] = {}
    core = getattr(model, "detector", None)
    if core is None:
        yield seen
        return
    hook = core.register_forward_hook(lambda _, __, output: seen.update(rois=output.rois, box_rois=output.box_rois))
    try:
        yield seen
    finally:
        hook.remove()


def predict_images(
    model: nn.Module, images: Sequence[torch.Tensor], device: torch.device
) -> list[dict[str, torch.Tensor]]:
    """Detections of `images` (`Tensor[3, H, W]` uint8 each), one after the other, on the host."""
    with inference(model):
        outputs = [model([image.to(device)])[0] for image in images]
    return [{name: value.cpu() for name, value in output.items()} for output in outputs]


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module is in the mode it was in before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def coco_results(predictions: dict[int, dict[str, torch.Tensor]], dataset: Any) -> CocoResults:
    """COCO's submission format, in the data set's order: image_id, category_id, bbox (x, y, w, h), score.

    Raises:
        RuntimeError: an image of the data set has no prediction.
    """
    missing = [image_id for image_id in dataset.image_ids if image_id not in predictions]
    if missing:
        raise RuntimeError(f"{len(missing)} images were never evaluated, the first with id {missing[0]}")
    results = []
    for image_id in dataset.image_ids:
        output = predictions[image_id]
        boxes = output["boxes"].double()
        sizes = boxes[:, 2:] - boxes[:, :2]
        columns = (boxes[:, :2].tolist(), sizes.tolist(), output["labels"].tolist(), output["scores"].tolist())
        for corner, size, label, score in zip(*columns, strict=True):
            category = dataset.category_ids[label - 1]
            results.append({"image_id": image_id, "category_id": category, "bbox": corner + size, "score": score})
    return results


def rois_of_the_box_head(predictions: dict[int, dict[str, torch.Tensor]]) -> dict[str, Any]:
    """`box_rois`: the mean number of RoIs of an image, and of those that went through the head that gives the boxes."""
    counts = [(int(output["rois"]), int(output["box_rois"])) for output in predictions.values() if "rois" in output]
    if not counts:
        return {}
    rois, box_rois = (sum(numbers) / len(counts) for numbers in zip(*counts, strict=True))
    return {"box_rois": {"all": rois, "seen": box_rois, "share": box_rois / rois if rois else 0.0}}
