"""Evaluates a trained head on given boxes: the score of a class, and the box moved by that class's regressor."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from doublehead.config import Recipe, to_dict
from doublehead.engine.checkpoint import LoadedModel, load_model
from doublehead.errors import UserError, config_errors
from doublehead.models import DoubleHeadRCNN, ImageBatch
from doublehead.models.heads import HeadOutput
from doublehead.models.images import BoxMap
from doublehead.models.readout import EXT_SOURCES, ReadOut, resolve_readout
from doublehead.ops import fuse_scores
from doublehead.ops.boxes import clip_boxes, decode_boxes


class HeadSpec(NamedTuple):
    """A parsed argument `[NAME=]CHECKPOINT[:READOUT]`."""

    name: str
    checkpoint: str
    readout: str | None
    named: bool = False
    """Whether the argument gives the name."""


class ImageFeatures(NamedTuple):
    """A detector's features of one image."""

    maps: list[Tensor]
    """The backbone's maps, `Tensor[1, C, H, W]` each."""
    size: Tensor
    """`Tensor[1, 2]`: (height, width) in the batch, without padding."""
    boxes: Tensor
    """`Tensor[n, 4]`: the ground truth in the batch's pixels, as in training."""
    into_batch: BoxMap
    """Maps boxes from the image's pixels to the batch's."""
    into_image: BoxMap
    """Maps boxes from the batch's pixels to the image's."""
    padded: tuple[int, int]
    """(height, width) of the batch."""


class Reading(NamedTuple):
    """A head's output for K boxes, each with a given class."""

    scores: Tensor
    """`Tensor[K]`: the score of the given class."""
    boxes: Tensor
    """`Tensor[K, 4]`: moved by the class's regressor, clipped to the image; the batch's pixels."""


@dataclass
class Reader:
    """One read-out of one trained detector."""

    name: str
    model: DoubleHeadRCNN
    recipe: Recipe
    classes: list[str]
    readout: ReadOut
    checkpoint: str = ""
    """The path as it was given; empty: it was not read from a file."""

    @torch.inference_mode()
    def features(self, image: Tensor, boxes: Tensor) -> ImageFeatures:
        """Run the backbone once: `image` `Tensor[3, H, W]` uint8, `boxes` its ground truth `Tensor[n, 4]`."""
        before = (image.shape[-2], image.shape[-1])
        transform = self.model.transform
        batch, (after,) = transform([image])
        maps = self.model.detector.backbone(batch.pixels)
        device = batch.pixels.device
        (into_batch,) = transform.maps_to_batch([before], [after], device)
        (into_image,) = transform.maps_to_images([before], [after], device)
        padded = (batch.pixels.shape[-2], batch.pixels.shape[-1])
        truth = into_batch(boxes.to(device, torch.float32))
        return ImageFeatures(maps, batch.sizes, truth, into_batch, into_image, padded)

    def rois(self, features: ImageFeatures, boxes: Tensor) -> Tensor:
        """Boxes of the image as RoIs of the batch, clipped to the image: `Tensor[K, 4]` -> `Tensor[K, 4]`."""
        return clip_boxes(features.into_batch(boxes)[None], features.size, self.model.detector.min_side)[0]

    @torch.inference_mode()
    def read(self, features: ImageFeatures, boxes: Tensor, labels: Tensor) -> Reading:
        """Run the heads on `boxes` `Tensor[K, 4]`, in the batch's pixels, each with its class in `labels` [K]."""
        return self.decode(self._run_heads(features, boxes, self.branches), features, boxes, labels)

    @property
    def branches(self) -> set[str]:
        """The names of the heads that it reads."""
        return {*self.readout.sources.classes, self.readout.sources.boxes}

    @functools.cached_property
    def backbone_digest(self) -> str:
        """Equal for detectors that make the same features of an image."""
        config = self.model.config
        what = [to_dict(config.image), config.legacy_boxes, to_dict(replace(config.backbone, weights=None))]
        return digest_of(what, self.model.detector.backbone.state_dict())

    @torch.inference_mode()
    def decode(self, outputs: dict[str, HeadOutput], features: ImageFeatures, boxes: Tensor, labels: Tensor) -> Reading:
        """`read` from the outputs of `branches`."""
        detector, sources = self.model.detector, self.readout.sources
        own = labels[:, None]
        deltas = outputs[sources.boxes].deltas.gather(1, own[..., None].expand(-1, 1, 4)).squeeze(1)
        moved = decode_boxes(deltas, boxes, self.recipe.model.roi.box_weights)
        moved = clip_boxes(moved[None], features.size, detector.min_side)[0]
        return Reading(self._scores(outputs).gather(1, own).squeeze(1), moved)

    @torch.inference_mode()
    def best_classes(self, features: ImageFeatures, boxes: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        """The highest score over classes without background, and that class: `Tensor[K]`, `Tensor[K]` int64 from 1.

        Args:
            boxes: `Tensor[K, 4]`, in the batch's pixels.
            chunk: the number of boxes that go through the heads at a time.

        Raises:
            UserError: a score is not finite.
        """
        classifiers = self.readout.sources.classes
        parts = [self._scores(self._run_heads(features, part, classifiers)) for part in boxes.split(chunk)]
        scores, classes = torch.cat(parts)[:, 1:].max(dim=1)
        self._check_finite(scores)
        return scores, classes + 1

    def _run_heads(self, features: ImageFeatures, boxes: Tensor, names: Collection[str]) -> dict[str, HeadOutput]:
        detector = self.model.detector
        scales = sorted({detector.heads.box_scales[name] for name in names})
        return detector.heads(detector.roi_pooling(features.maps, as_rois(boxes), scales), names)

    def _scores(self, outputs: dict[str, HeadOutput]) -> Tensor:
        """`Tensor[K, C]`: of every class, background first, as the read-out joins the classifiers."""
        logits = [outputs[name].logits for name in self.readout.sources.classes]
        if len(logits) == 2:
            return fuse_scores(*logits, self.readout.detection.fusion)
        return logits[0].softmax(-1)

    def _check_finite(self, *values: Tensor) -> None:
        if not all(bool(value.isfinite().all()) for value in values):
            raise UserError(f"{self.name}: gives scores or boxes that are not finite: choose another checkpoint")

    def read_all(self, features: ImageFeatures, boxes: Tensor, labels: Tensor, chunk: int) -> Reading:
        """`read` for any number of boxes, at most `chunk` at a time.

        Raises:
            UserError: a score or a box is not finite.
        """
        return self.join(
            [self.read(features, *part) for part in zip(boxes.split(chunk), labels.split(chunk), strict=True)]
        )

    def join(self, parts: Sequence[Reading]) -> Reading:
        """One reading of several.

        Raises:
            UserError: a score or a box is not finite.
        """
        scores, moved = (torch.cat(columns) for columns in zip(*parts, strict=True))
        self._check_finite(scores, moved)
        return Reading(scores, moved)

    @torch.inference_mode()
    def detect(self, image: Tensor) -> dict[str, Tensor]:
        """Final detections of `image` with this read-out, in its pixels (see `DoubleHeadRCNN`)."""
        self.model.detector.readout = self.readout
        return self.model([image])[0]

    @torch.inference_mode()
    def proposals(self, features: ImageFeatures) -> Tensor:
        """The RPN's proposals, `Tensor[n, 4]` in the batch's pixels."""
        pixels = features.maps[0].new_empty((1, 3, *features.padded))  # only its shape is used
        proposals, _ = self.model.detector.rpn(ImageBatch(pixels, features.size), features.maps)
        return proposals.boxes[proposals.valid]


def as_rois(boxes: Tensor) -> Tensor:
    """Boxes `Tensor[K, 4]` of the only image of a batch as `Tensor[K, 5]`, with its number first."""
    return torch.cat((boxes.new_zeros(len(boxes), 1), boxes), dim=1)


def digest_of(config: Any, state: Mapping[str, Tensor]) -> str:
    """The SHA-256 of plain values and a module's weights and buffers."""
    digest = hashlib.sha256(json.dumps(config).encode())
    for name, tensor in state.items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def parse_spec(text: str) -> HeadSpec:
    """Parse `[NAME=]CHECKPOINT[:READOUT]`; the default name is the checkpoint's folder, with the read-out.

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
    return HeadSpec(name or (f"{folder} {readout}".strip()), checkpoint, readout or None, bool(name))


def open_readers(texts: Sequence[str], device: torch.device, seeds: bool = False) -> list[Reader]:
    """Load every checkpoint once and make a reader for each spec, in order.

    Args:
        seeds: accept a name that is given several times; these are then trainings of one head with several seeds.

    Raises:
        UserError: there is no spec, two have the same name, classes differ, or a model was not trained for a read-out.
        CheckpointError: a checkpoint cannot be read.
    """
    specs = [parse_spec(text) for text in texts]
    if not specs:
        raise UserError("no head is named: give at least one [NAME=]CHECKPOINT[:READOUT]")
    names = [spec.name for spec in specs if not (seeds and spec.named)]
    names += {spec.name for spec in specs if seeds and spec.named}
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two heads have the name {repeated[0]!r}: give names, as in NAME=CHECKPOINT")
    loaded: dict[str, LoadedModel] = {}
    readers = []
    for spec in specs:
        if spec.checkpoint not in loaded:
            loaded[spec.checkpoint] = load_model(spec.checkpoint)
        model, recipe, classes, _ = loaded[spec.checkpoint]
        with config_errors():
            readout = resolve_readout(recipe.model, spec.readout)
        readers.append(Reader(spec.name, model.to(device), recipe, classes, readout, spec.checkpoint))
    for reader in readers[1:]:
        if reader.classes != readers[0].classes:
            raise UserError(f"{reader.name} and {readers[0].name} have different classes: they cannot be compared")
    return readers
