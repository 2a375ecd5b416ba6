"""Finds which layers of a detector run in 8 bits: scales from calibration images, the rest by measuring AP.

All layers are tried first.  While the AP is further below that of float32 than allowed, one more layer returns to
float.  Candidates come in the order in which they disturb the heads' outputs; a few of them are measured, and the one
that gains most is taken, so that every decision is a measured one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from tqdm import tqdm

from doublehead.config import DetectionConfig
from doublehead.engine.evaluator import inference
from doublehead.errors import DataError, UserError
from doublehead.models import quantized

ORDER_IMAGES = 4
"""Calibration images on which layers are ordered by the error they make."""
TRIED = 3
"""Layers that are measured before one of them returns to float."""


class LeftOut(NamedTuple):
    """A layer that returned to float."""

    layer: str
    AP_before: float
    """0 .. 1, with it and the layers after it in int8."""
    AP_after: float
    """With it in float."""
    output_error: float
    """By how much it alone changes the heads' outputs, relative to these."""


class Choice(NamedTuple):
    """Which layers run in 8 bits, and what that costs."""

    left_out: list[LeftOut]
    """In the order in which they returned to float."""
    int8_all_layers: float
    """AP with all layers in int8, 0 .. 1."""
    int8: float
    """AP with those left out in float."""


class NothingLeft(UserError):
    """Every layer had to return to float."""

    exit_code = 1


def calibration_images(dataset: Any, wanted: int | None, most: int = 64) -> tuple[list[Tensor], list[str]]:
    """Images spread evenly over a data set; one that cannot be decoded is replaced by the next where it allows that.

    Args:
        dataset: a `DetectionDataset`.
        wanted: how many; None: `most`, or all if there are fewer.

    Returns:
        (images `Tensor[3, H, W]` uint8, their file names).

    Raises:
        UserError: there are fewer.
        DataError: an image cannot be decoded.
    """
    count = min(most, len(dataset)) if wanted is None else wanted
    if count > len(dataset):
        raise UserError(f"--images is {count}, and {dataset.name} has {len(dataset)}: give at most {len(dataset)}")
    first = [i * len(dataset) // count for i in range(count)]
    spare = iter(sorted(set(range(len(dataset))) - set(first)))
    images, names = [], []
    for index in tqdm(first, desc="reading", unit="image", leave=False, disable=None):
        image, used = _decoded(dataset, index, spare)
        images.append(image)
        names.append(dataset.file_names[used])
    return images, names


def _decoded(dataset: Any, index: int, spare: Iterator[int]) -> tuple[Tensor, int]:
    while True:
        try:
            return dataset[index][0], index
        except DataError:
            if not dataset.replace_unreadable:
                raise
            following = next(spare, None)
            if following is None:
                raise
            index = following


def measure_scales(model: nn.Module, images: Sequence[Tensor]) -> dict[str, float]:
    """Layer name -> scale of its input, from what the layers see on these images.

    Raises:
        UserError: a layer's inputs are of no use, such as all zero; the message names it.
    """
    with inference(model), quantized.observe(model) as observation:
        for image in tqdm(images, desc="calibrating", unit="image", leave=False, disable=None):
            model([image])
    try:
        return observation.scales()
    except ValueError as error:
        raise UserError(f"calibration failed: {error}") from error


def choose_layers(
    model: nn.Module,
    scales: Mapping[str, float],
    measure_ap: Callable[[], float],
    errors: Callable[[], dict[str, float]],
    fp32: float,
    most_loss: float,
    say: Callable[[str], None] = print,
) -> Choice:
    """Leave out layers until the AP is within `most_loss` of `fp32`.  The model is left with the choice in place.

    Args:
        scales: of all layers that may run in 8 bits.
        measure_ap: gives the AP of the model as it is now, 0 .. 1.
        errors: layer -> error of the outputs that it makes; called only if a layer has to be left out.
        fp32: AP in float32, 0 .. 1.
        most_loss: 0 .. 1.
        say: told of every step.

    Raises:
        NothingLeft: not even one layer can run in 8 bits within the bound.
    """

    def measured(without: Sequence[str]) -> float:
        quantized.use_int8(model, scales, without)
        return measure_ap()

    def enough(ap: float) -> bool:
        return fp32 - ap <= most_loss + 1e-9

    say(f"measuring int8, all {len(scales)} layers")
    everything = ap = measured([])
    say(f"AP {_points(ap)}, {_signed(ap - fp32)}")
    left_out: list[LeftOut] = []
    order: list[str] = []
    error: dict[str, float] = {}
    while not enough(ap):
        if not error:
            error = errors()
            order = sorted(scales, key=lambda name: -error[name])
        if len(order) == 1:
            raise NothingLeft(
                f"int8 loses more than {100 * most_loss:g} AP with any layer in it (fp32 {_points(fp32)}, last "
                f"{_points(ap)}): nothing is written; allow more by --most-loss, or stay with bf16 or fp32"
            )
        without, tried = [entry.layer for entry in left_out], {}
        for name in order[:TRIED]:
            say(f"measuring with {name} in float{f' beside {len(without)} others' if without else ''}")
            tried[name] = measured([*without, name])
            say(f"AP {_points(tried[name])}, {_signed(tried[name] - fp32)}")
            if enough(tried[name]):
                break
        best = max(tried, key=tried.__getitem__)
        left_out.append(LeftOut(best, ap, tried[best], error[best]))
        order.remove(best)
        ap = tried[best]
    quantized.use_int8(model, scales, [entry.layer for entry in left_out])
    return Choice(left_out, everything, ap)


def output_errors(model: nn.Module, images: Sequence[Tensor], scales: Mapping[str, float]) -> dict[str, float]:
    """Layer name -> by how much the heads' outputs change when it alone runs in 8 bits, relative to these.

    All heads see all proposals of each image, whichever read-out the model has.
    """
    sums = dict.fromkeys(scales, 0.0)
    with inference(model):
        for image in tqdm(images, desc="ordering the layers", unit="image", leave=False, disable=None):
            outputs = _heads_of(model, image)
            expected = outputs()
            for name in scales:
                quantized.use_int8(model, scales, [other for other in scales if other != name])
                sums[name] += _distance(outputs(), expected)
    return {name: total / len(images) for name, total in sums.items()}


def _heads_of(model: nn.Module, image: Tensor) -> Callable[[], list[Tensor]]:
    """Runs the heads, as they are then, on the proposals of `image`; gives their outputs."""
    detector = model.detector
    quantized.use_float(model)
    batch, _ = model.transform([image])
    features = detector.backbone(batch.pixels)
    proposals, _ = detector.rpn(batch, features)
    pooled = detector.roi_pooling(features, proposals.boxes)

    def outputs() -> list[Tensor]:
        return [tensor for output in detector.heads(pooled).values() for tensor in output if tensor is not None]

    return outputs


def _distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Mean over the outputs of the relative Euclidean distance."""
    each = [
        ((one - other).norm() / other.norm().clamp(min=1e-12)).item()
        for one, other in zip(found, expected, strict=True)
    ]
    return sum(each) / len(each)


def ground_truth_digest(dataset: Any) -> str:
    """Tells data sets apart: of the names, sizes and annotations, not of the pictures' pixels."""
    return hashlib.sha256(json.dumps(dataset.coco_ground_truth(), sort_keys=True).encode()).hexdigest()


def readout_of(detection: DetectionConfig) -> dict[str, str | float]:
    """What of a read-out decides the AP of a model."""
    return {
        "readout": detection.readout, "fusion": detection.fusion, "ext_gate": detection.ext_gate,
        "score_threshold": detection.score_threshold,
    }  # fmt: skip


def _points(ap: float) -> str:
    return f"{100 * ap:.2f}"


def _signed(difference: float) -> str:
    return f"{100 * difference:+.2f} to fp32"
