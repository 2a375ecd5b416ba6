"""A frozen detector's features, proposals and targets of every image, computed once, in a memory-mapped file.

`features.bin` holds float32 alone, one image after the other: the maps (channels last), the proposals, the objects'
boxes and labels.  `features.json` says where each begins.  Each image goes through the detector by itself, so that
its features do not depend on its neighbours.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from doublehead.data import DetectionDataset, Loader, Target, horizontal_flip
from doublehead.engine.files import replacing, write_json
from doublehead.errors import UserError
from doublehead.models import DoubleHeadRCNN
from doublehead.models.structures import Proposals, Targets

DATA_FILE, INDEX_FILE = "features.bin", "features.json"
FORMAT = "doublehead.features/1"


class ImageFeatures(NamedTuple):
    """What the frozen part of a detector gives for one image, alone in its batch."""

    maps: list[Tensor]
    """The backbone's maps that RoIs are pooled from, `Tensor[1, C, H, W]` each, channels last."""
    proposals: Proposals
    """`[1, R]`."""
    targets: Targets
    """`[1, G]`."""
    size: tuple[int, int]
    """(height, width) in the batch, without padding."""
    stored: tuple[int, int]
    """(height, width) of the image as stored."""
    image_id: int


class FeatureFile:
    """The features in a folder; items are `(index, mirrored)`.

    Args:
        folder: where `build` put them.
        fingerprint: what they have to be of.
        device: where tensors go.

    Raises:
        UserError: they are of something else, or damaged.
    """

    def __init__(self, folder: Path, fingerprint: str, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self.index = _read_index(folder)
        if self.index.get("fingerprint") != fingerprint:
            raise UserError(
                f"{folder}: holds the features of another detector or of other data: remove it, or give another --out"
            )
        path = folder / DATA_FILE
        if not path.is_file() or path.stat().st_size != self.index["bytes"]:
            raise UserError(f"{path}: is missing or has another size than {INDEX_FILE} says: remove {folder}")
        self._values = np.memmap(path, dtype=np.float32, mode="r") if self.index["bytes"] else np.empty(0, np.float32)
        self._items = {(item["index"], item["mirrored"]): item for item in self.index["items"]}

    def __getitem__(self, item: tuple[int, bool]) -> ImageFeatures:
        entry = self._items[item]
        start = entry["offset"]
        maps = []
        for height, width in entry["maps"]:
            values, start = self._take(start, (1, height, width, self.index["channels"]))
            maps.append(values.permute(0, 3, 1, 2))
        proposals, start = self._take(start, (1, entry["slots"], 4))
        boxes, start = self._take(start, (1, entry["objects"], 4))
        labels, start = self._take(start, (1, entry["objects"]))
        if entry["objects"] == 0:  # an empty slot, as `pad_targets` has
            boxes, labels = boxes.new_zeros(1, 1, 4), labels.new_zeros(1, 1)
        valid = torch.arange(entry["slots"], device=self.device)[None] < entry["proposals"]
        targets = Targets(boxes, labels.long())
        size, stored = tuple(entry["size"]), tuple(entry["stored"])
        return ImageFeatures(maps, Proposals(proposals, valid), targets, size, stored, entry["image_id"])

    def _take(self, start: int, shape: tuple[int, ...]) -> tuple[Tensor, int]:
        """A copy of the values from `start` on, so that nothing can write to the file."""
        end = start + int(np.prod(shape))
        return torch.from_numpy(self._values[start:end].reshape(shape).copy()).to(self.device), end


def fingerprint(model: DoubleHeadRCNN, dataset: DetectionDataset, train: bool, mirrored: bool) -> str:
    """A digest of all that the features depend on."""
    digest = hashlib.sha256(json.dumps([FORMAT, train, mirrored]).encode())
    config = model.config
    digest.update(repr((config.backbone, config.rpn, config.image, config.legacy_boxes)).encode())
    for part in (model.detector.backbone, model.detector.rpn):
        for name, tensor in part.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    annotations = [dataset.name, dataset.image_ids, dataset.image_sizes, dataset.annotations()]
    digest.update(json.dumps(annotations).encode())
    return digest.hexdigest()


def build(
    folder: Path, model: DoubleHeadRCNN, dataset: DetectionDataset, train: bool, mirrored: bool, workers: int
) -> None:
    """Compute the features of every image unless `folder` has them.

    Args:
        folder: created if missing.
        model: the frozen detector, in eval mode, on its device.
        dataset: the images.
        train: propose as in training (its limits before and after NMS), for `sample_rois`; else as at inference.
        mirrored: also of each image mirrored left and right.
        workers: processes that load images.

    Raises:
        DataError: an image cannot be decoded; nothing stays.
        UserError: the folder cannot be written.
    """
    wanted = fingerprint(model, dataset, train, mirrored)
    if (folder / INDEX_FILE).exists():
        FeatureFile(folder, wanted, torch.device("cpu"))  # raises if they are of something else
        return
    begun = time.monotonic()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / DATA_FILE) as temporary, open(temporary, "wb") as file:
            items = list(_write_all(file, model, dataset, train, mirrored, workers))
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be written: {error.strerror}") from error
    index = {
        "format": FORMAT,
        "fingerprint": wanted,
        "channels": items[0][1] if items else 0,
        "bytes": (folder / DATA_FILE).stat().st_size,
        "seconds": round(time.monotonic() - begun, 1),
        "items": [item for item, _ in items],
    }
    write_json(folder / INDEX_FILE, index)


def _write_all(
    file: BinaryIO, model: DoubleHeadRCNN, dataset: DetectionDataset, train: bool, mirrored: bool, workers: int
) -> Iterator[tuple[dict[str, Any], int]]:
    """The index entry and the number of channels of each image, whose values go to `file`."""
    loader = Loader(dataset, [[(0, index)] for index in range(len(dataset))], None, workers)
    bar = tqdm(loader, total=len(dataset), desc="features", unit="image", leave=False, disable=None)
    offset = 0
    for index, ((image,), (target,)) in enumerate(bar):
        for flipped in (False, True) if mirrored else (False,):
            seen = horizontal_flip(image, target) if flipped else (image, target)
            found = compute_features(model, *seen, train)
            parts = [level.permute(0, 2, 3, 1) for level in found.maps]
            # With empty slots: how many there are decides what `sample_rois` draws.
            parts += [found.proposals.boxes, found.targets.boxes[found.targets.valid]]
            parts += [found.targets.labels[found.targets.valid]]
            for part in parts:
                file.write(part.contiguous().float().cpu().numpy().tobytes())
            yield (
                {
                    "index": index,
                    "mirrored": flipped,
                    "image_id": found.image_id,
                    "offset": offset,
                    "maps": [list(level.shape[-2:]) for level in found.maps],
                    "slots": found.proposals.boxes.shape[1],
                    "proposals": int(found.proposals.valid.sum()),
                    "objects": len(parts[-2]),
                    "size": list(found.size),
                    "stored": list(found.stored),
                },
                found.maps[0].shape[1],
            )
            offset += sum(part.numel() for part in parts)


@torch.no_grad()
def compute_features(model: DoubleHeadRCNN, image: Tensor, target: Target, train: bool) -> ImageFeatures:
    """Run the frozen part of `model`, in eval mode, on one image `Tensor[3, H, W]`; arguments as of `build`."""
    before = (image.shape[-2], image.shape[-1])
    batch, (after,) = model.transform([image])
    maps = model.detector.backbone(batch.pixels)
    model.detector.rpn.train(train)  # its limits; it has no layer that differs in training
    try:
        proposals, _ = model.detector.rpn(batch, maps)
    finally:
        model.detector.rpn.eval()
    targets = model.transform.targets([dict(target)], [before], [after])
    pooled = [level.contiguous(memory_format=torch.channels_last) for level in maps[: len(_strides(model))]]
    return ImageFeatures(pooled, proposals, targets, after, before, int(target["image_id"]))


def _strides(model: DoubleHeadRCNN) -> Sequence[int]:
    return model.detector.roi_pooling.strides


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX_FILE
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] != FORMAT or not isinstance(index["items"], list):
            raise ValueError("another format")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}): remove {folder} and it is made again") from error
    return index
