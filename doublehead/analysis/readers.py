"""Reads a trained head at any boxes: the score of a class, and where that class's regressor moves the box."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from doublehead.config import Recipe
from doublehead.engine.checkpoint import LoadedModel, load_model
from doublehead.engine.errors import UserError, config_errors
from doublehead.models import DoubleHeadRCNN, ImageBatch
from doublehead.models.detections import EXT_SOURCES, Sources, resolve_sources
from doublehead.ops import fuse_scores
from doublehead.ops.boxes import clip_boxes, decode_boxes


class HeadSpec(NamedTuple):
    """`[NAME=]CHECKPOINT[:READOUT]` of a command line."""

    name: str
    checkpoint: str
    readout: str | None


class ImageFeatures(NamedTuple):
    """One image as a detector sees it."""

    maps: list[Tensor]
    """The backbone's maps, `Tensor[1, C, H, W]` each."""
    size: Tensor
    """`Tensor[1, 2]`: (height, width) in the batch, without padding."""
    boxes: Tensor
    """`Tensor[n, 4]`: the ground truth in the batch's pixels."""
    scale: Tensor
    """`Tensor[4]`: the batch's pixels per pixel of the image, for x1, y1, x2, y2."""
    padded: tuple[int, int]
    """(height, width) of the batch."""


class Reading(NamedTuple):
    """What a head says of K boxes, each taken as a box of one given class."""

    scores: Tensor
    """`Tensor[K]`: of the given class."""
    boxes: Tensor
    """`Tensor[K, 4]`: moved by the class's regressor, clipped to the image; the batch's pixels."""


@dataclass
class Reader:
    """One read-out of one trained detector."""

    name: str
    model: DoubleHeadRCNN
    recipe: Recipe
    classes: list[str]
    sources: Sources

    @torch.inference_mode()
    def features(self, image: Tensor, boxes: Tensor) -> ImageFeatures:
        """Run the backbone once: `image` `Tensor[3, H, W]` uint8, `boxes` its ground truth `Tensor[n, 4]`."""
        before = (image.shape[-2], image.shape[-1])
        batch, after = self.model.transform([image])
        maps = self.model.detector.backbone(batch.pixels)
        y, x = after[0][0] / before[0], after[0][1] / before[1]
        scale = torch.tensor([x, y, x, y], device=batch.pixels.device)
        padded = (batch.pixels.shape[-2], batch.pixels.shape[-1])
        return ImageFeatures(maps, batch.sizes, boxes.to(scale.device) * scale, scale, padded)

    @torch.inference_mode()
    def read(self, features: ImageFeatures, boxes: Tensor, labels: Tensor) -> Reading:
        """Run the heads on `boxes` `Tensor[K, 4]` (the batch's pixels), each as a box of its class in `labels` [K]."""
        detector = self.model.detector
        rois = torch.cat((boxes.new_zeros(len(boxes), 1), boxes), dim=1)
        names = {*self.sources.classes, self.sources.boxes}
        scales = sorted({detector.heads.box_scales[name] for name in names})
        outputs = detector.heads(detector.roi_pooling(features.maps, rois, scales), names)
        logits = [outputs[name].logits for name in self.sources.classes]
        if len(logits) == 2:
            scores = fuse_scores(*logits, detector.detection.fusion)
        else:
            scores = logits[0].softmax(-1)
        own = labels[:, None]
        deltas = outputs[self.sources.boxes].deltas.gather(1, own[..., None].expand(-1, 1, 4)).squeeze(1)
        moved = decode_boxes(deltas, boxes, self.recipe.model.roi.box_weights)
        moved = clip_boxes(moved[None], features.size, detector.least_side)[0]
        return Reading(scores.gather(1, own).squeeze(1), moved)

    def read_all(self, features: ImageFeatures, boxes: Tensor, labels: Tensor, chunk: int) -> Reading:
        """`read` of any number of boxes, at most `chunk` at a time.

        Raises:
            UserError: a score or a box is not finite.
        """
        parts = [self.read(features, *part) for part in zip(boxes.split(chunk), labels.split(chunk), strict=True)]
        scores, moved = (torch.cat(columns) for columns in zip(*parts, strict=True))
        if not bool(scores.isfinite().all() & moved.isfinite().all()):
            raise UserError(f"{self.name}: gives scores or boxes that are not finite: choose a sound checkpoint")
        return Reading(scores, moved)

    @torch.inference_mode()
    def detect(self, image: Tensor) -> dict[str, Tensor]:
        """Final detections of `image` with this read-out, in its pixels (see `DoubleHeadRCNN`)."""
        self.model.detector.sources = self.sources
        return self.model([image])[0]

    @torch.inference_mode()
    def proposals(self, features: ImageFeatures) -> Tensor:
        """The RPN's proposals, `Tensor[n, 4]` in the batch's pixels."""
        pixels = features.maps[0].new_empty((1, 3, *features.padded))  # only its shape is looked at
        proposals, _ = self.model.detector.rpn(ImageBatch(pixels, features.size), features.maps)
        return proposals.boxes[proposals.valid]


def shared_features(readers: Sequence[Reader], image: Tensor, boxes: Tensor) -> list[ImageFeatures]:
    """`Reader.features` for each reader, computed once for those that read the same detector."""
    found: dict[int, ImageFeatures] = {}
    for reader in readers:
        if id(reader.model) not in found:
            found[id(reader.model)] = reader.features(image, boxes)
    return [found[id(reader.model)] for reader in readers]


def parse_spec(text: str) -> HeadSpec:
    """Take `[NAME=]CHECKPOINT[:READOUT]` apart; without a name the checkpoint's folder (and read-out) is the name.

    Raises:
        UserError: no checkpoint is named.
    """
    name, _, rest = text.rpartition("=")
    checkpoint, colon, readout = rest.rpartition(":")
    if not colon or readout not in EXT_SOURCES:
        checkpoint, readout = rest, ""
    if not checkpoint:
        raise UserError(f"{text!r}: expected [NAME=]CHECKPOINT[:READOUT]")
    path = Path(checkpoint)
    folder = path.name if path.suffix != ".safetensors" else path.parent.name
    return HeadSpec(name or (f"{folder} {readout}".strip()), checkpoint, readout or None)


def open_readers(texts: Sequence[str], device: torch.device) -> list[Reader]:
    """Load every checkpoint once and make a reader for each spec, in order.

    Raises:
        UserError: no spec, two of the same name, classes that differ, or a read-out that a model was not trained for.
        CheckpointError: a checkpoint cannot be read.
    """
    specs = [parse_spec(text) for text in texts]
    if not specs:
        raise UserError("no head is named: give at least one [NAME=]CHECKPOINT[:READOUT]")
    names = [spec.name for spec in specs]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two heads have the name {repeated[0]!r}: give names, as in NAME=CHECKPOINT")
    loaded: dict[str, LoadedModel] = {}
    readers = []
    for spec in specs:
        if spec.checkpoint not in loaded:
            loaded[spec.checkpoint] = load_model(spec.checkpoint)
        model, recipe, classes, _ = loaded[spec.checkpoint]
        config = recipe.model
        readout = spec.readout or config.detection.readout
        with config_errors():
            sources = resolve_sources(config.head.kind, readout, config.detection.fusion, config.loss)
        readers.append(Reader(spec.name, model.to(device), recipe, classes, sources))
    for reader in readers[1:]:
        if reader.classes != readers[0].classes:
            raise UserError(f"{reader.name} and {readers[0].name} know different classes: they cannot be compared")
    return readers
