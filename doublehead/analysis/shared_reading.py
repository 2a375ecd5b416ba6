"""Reads several heads on the same boxes, and computes what they share once.

Detectors with equal backbones, such as those of `analyze heads`, share an image's features, and with equal pooling the
pooled maps too.  Read-outs of one detector share its branches: an Ext's fused, split, fc and conv cost one run of each.
Every call gets the very boxes that it would get for one reader alone, so the results are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from doublehead.analysis.readers import ImageFeatures, Reader, Reading, as_rois
from doublehead.models.heads import HeadOutput


def shared_features(readers: Sequence[Reader], image: Tensor, boxes: Tensor) -> list[ImageFeatures]:
    """`Reader.features` of each reader, computed once, and the same object, for equal backbones."""
    found: dict[str, ImageFeatures] = {}
    for reader in readers:
        if reader.backbone_digest not in found:
            found[reader.backbone_digest] = reader.features(image, boxes)
    return [found[reader.backbone_digest] for reader in readers]


def read_each(
    readers: Sequence[Reader], features: Sequence[ImageFeatures], boxes: Tensor, labels: Tensor, chunk: int
) -> list[Reading]:
    """What `Reader.read_all` gives for each reader.

    Args:
        features: of the image, for each reader, from `shared_features`.
        boxes: `Tensor[K, 4]`, in the image's pixels.
        labels: `Tensor[K]` int64: the class of each box.
        chunk: the number of boxes that go through the heads at a time.

    Raises:
        UserError: a score or a box is not finite.
    """
    rois = {id(own): reader.rois(own, boxes) for reader, own in zip(readers, features, strict=True)}
    parts: list[list[Reading]] = [[] for _ in readers]
    for first in range(0, len(boxes), chunk):
        where = slice(first, first + chunk)
        shared = _Chunk({key: every[where] for key, every in rois.items()})
        for reader, own, found in zip(readers, features, parts, strict=True):
            found.append(reader.decode(shared.outputs(reader, own), own, rois[id(own)][where], labels[where]))
    return [reader.join(found) for reader, found in zip(readers, parts, strict=True)]


class _Chunk:
    """What was computed so far for some boxes."""

    def __init__(self, boxes: dict[int, Tensor]) -> None:
        self._boxes = boxes  # id of features -> `Tensor[K, 4]` in the batch's pixels
        self._pooled: dict[tuple, dict[float, Tensor]] = {}
        self._outputs: dict[int, dict[str, HeadOutput]] = {}

    @torch.inference_mode()
    def outputs(self, reader: Reader, features: ImageFeatures) -> dict[str, HeadOutput]:
        """Branch name -> its output, at least for the branches that the reader reads."""
        detector = reader.model.detector
        done = self._outputs.setdefault(id(reader.model), {})
        if names := reader.branches - done.keys():
            scales = sorted({detector.heads.box_scales[name] for name in names})
            done |= detector.heads(self._pool(reader, features, scales), names)
        return done

    def _pool(self, reader: Reader, features: ImageFeatures, scales: list[float]) -> dict[float, Tensor]:
        pooling = reader.model.detector.roi_pooling
        done = self._pooled.setdefault((id(features), *_pooling_rule(pooling)), {})
        if missing := [scale for scale in scales if scale not in done]:
            done |= pooling(features.maps, as_rois(self._boxes[id(features)]), missing)
        return done


def _pooling_rule(pooling: Any) -> tuple:
    """All that decides what a `RoIPooling` makes of given maps, boxes and scales."""
    c = pooling.config
    return pooling.strides, c.output_size, c.sampling_ratio, c.aligned, c.canonical_size, c.level_rule
