"""What trained heads find: AP of every kind that they can be put together to, and regressed boxes by proposals' IoU."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from doublehead.analysis.heads.features import FeatureFile, ImageFeatures
from doublehead.analysis.heads.specs import HeadSpec, Member
from doublehead.analysis.heads.training import pool, pool_key
from doublehead.analysis.windows import BINS, iou_bins, sliding_windows
from doublehead.config import Fusion, ReadOutName
from doublehead.data import DetectionDataset
from doublehead.engine.coco_metrics import compute_metrics
from doublehead.engine.evaluator import coco_results
from doublehead.models.detections import detect
from doublehead.models.heads import HeadOutput
from doublehead.models.images import ImageTransform
from doublehead.models.readout import ReadOut, resolve_readout
from doublehead.ops.boxes import box_iou, clip_boxes, decode_boxes
from doublehead.ops.score_fusion import FUSIONS

NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


class Readable(NamedTuple):
    """One member in one read-out."""

    member: Member
    readout: ReadOut


class Windows(NamedTuple):
    """Some sliding windows of an image's objects (see `analysis.windows`), in the batch's pixels."""

    boxes: Tensor
    """`Tensor[K, 4]`."""
    truth: Tensor
    """`Tensor[K, 4]`: the object of each."""
    labels: Tensor
    """`Tensor[K]` int64: its class."""
    bins: Tensor
    """`Tensor[K]` int64: the bin of the window's IoU with its object."""


def readables(members: Sequence[Member], every: bool) -> list[Readable]:
    """Each member in its own read-out, or in the most complete one that its loss weights train.

    With `every` an Ext also in the others, and with every fusion.
    """
    found = []
    for member in members:
        trained = []
        for readout, fusion in _ways(member):
            with contextlib.suppress(ValueError):  # its loss weights leave a needed head untrained
                trained.append(Readable(member, resolve_readout(member.model, readout, fusion)))
        found += trained if every else trained[:1]
    return found


def _ways(member: Member) -> list[tuple[ReadOutName, Fusion]]:
    """Read-outs and fusions, the configured ones first."""
    own = member.model.detection
    if member.kind != "double_head_ext":
        return [(own.readout, own.fusion)]
    ways = [(own.readout, own.fusion), ("fused", own.fusion)]
    ways += [(readout, own.fusion) for readout in ("split", "fc", "conv")]
    ways += [("fused", fusion) for fusion in FUSIONS]
    return list(dict.fromkeys(ways))


class Reader:
    """Reads heads on validation images.

    Args:
        features: of the validation images.
        dataset: they.
        transform: the detector's, to carry boxes into the images' pixels.
        strides: pixels per cell of each map.
        min_side: the detector's.
        windows: sliding windows of each object, drawn at random; the same at every call.
    """

    def __init__(
        self,
        features: FeatureFile,
        dataset: DetectionDataset,
        transform: ImageTransform,
        strides: Sequence[int],
        min_side: float,
        windows: int,
    ) -> None:
        self.features, self.dataset, self.transform = features, dataset, transform
        self.strides, self.min_side, self.windows = strides, min_side, windows

    @torch.no_grad()
    def read(
        self, heads: Mapping[HeadSpec, nn.Module], wanted: Sequence[Readable]
    ) -> tuple[list[dict[str, Any]], dict[HeadSpec, dict[str, Any]]]:
        """The metrics of each of `wanted`, and by head the scores and regressed IoUs of windows.

        Returns:
            What `compute_metrics` gives; and for each head `windows`, `regressed_iou`, `score`: 20 numbers
            each, by the bins of the windows' IoU; the means are None in empty bins or where the head lacks the task.
        """
        for head in heads.values():
            head.eval()
        sums = {spec: torch.zeros(3, BINS, dtype=torch.float64) for spec in heads}
        found: list[dict[int, dict[str, Tensor]]] = [{} for _ in wanted]
        for index in range(len(self.dataset)):
            image = self.features[index, False]
            outputs = self._run(heads, image, image.proposals.boxes)
            for readable, predictions in zip(wanted, found, strict=True):
                predictions[image.image_id] = self._detect(readable, outputs, image)
            if windows := self._windows(image):
                for spec, output in self._run(heads, image, windows.boxes[None]).items():
                    sums[spec] += self._moments(spec, output, windows, image)
        truth = self.dataset.coco_ground_truth()
        metrics = [
            compute_metrics(truth, coco_results(predictions, self.dataset), self.dataset, False)
            for predictions in found
        ]
        return metrics, {spec: _means(spec, values) for spec, values in sums.items()}

    def _run(
        self, heads: Mapping[HeadSpec, nn.Module], image: ImageFeatures, boxes: Tensor
    ) -> dict[HeadSpec, HeadOutput]:
        pooled = pool(image, boxes, {pool_key(spec) for spec in heads}, self.strides)
        return {spec: head(pooled[pool_key(spec)]) for spec, head in heads.items()}

    def _detect(
        self, readable: Readable, outputs: Mapping[HeadSpec, HeadOutput], image: ImageFeatures
    ) -> dict[str, Tensor]:
        member, readout = readable
        own = {name: outputs[spec] for name, spec in member.heads.items()}
        size = torch.tensor([image.size], dtype=torch.float32, device=self.features.device)
        found = detect(own, readout, image.proposals, size, member.model.roi.box_weights, self.min_side)
        (detections,) = self.transform.detections(found, [image.stored], [image.size])
        return {name: values.cpu() for name, values in detections.items()}

    def _windows(self, image: ImageFeatures) -> Windows | None:
        """A draw of the image's windows that depends on its id alone."""
        valid = image.targets.valid[0]
        truth, labels = image.targets.boxes[0][valid], image.targets.labels[0][valid]
        wide = ((truth[:, 2:] - truth[:, :2]) >= 0.1).all(-1)
        truth, labels = truth[wide], labels[wide]
        if len(truth) == 0 or self.windows == 0:
            return None
        every = sliding_windows(truth, image.size, (0, image.image_id))
        draws = random.Random(f"windows/{image.image_id}")
        count = every.shape[1]
        chosen = [sorted(draws.sample(range(count), min(self.windows, count))) for _ in truth]
        boxes = every.gather(1, torch.tensor(chosen, device=truth.device)[..., None].expand(-1, -1, 4)).flatten(0, 1)
        rows = torch.arange(len(truth), device=truth.device).repeat_interleave(len(chosen[0]))
        ious = box_iou(boxes[:, None], truth[rows][:, None])[:, 0, 0].clamp(0, 1)
        return Windows(boxes, truth[rows], labels[rows], iou_bins(ious))

    def _moments(self, spec: HeadSpec, output: HeadOutput, windows: Windows, image: ImageFeatures) -> Tensor:
        """Sums by bin, `Tensor[3, BINS]` float64: windows, regressed IoUs, scores of the windows' classes."""
        rows = torch.arange(len(windows.labels), device=windows.labels.device)
        values = [torch.ones_like(windows.boxes[:, 0]).double()]
        if output.deltas is None:
            values.append(torch.zeros_like(values[0]))
        else:
            moved = decode_boxes(output.deltas[rows, windows.labels], windows.boxes, spec.roi.box_weights)
            size = torch.tensor([image.size], dtype=torch.float32, device=moved.device)
            moved = clip_boxes(moved[None], size, self.min_side)[0]
            values.append(box_iou(moved[:, None], windows.truth[:, None])[:, 0, 0].clamp(0, 1).double())
        scores = torch.zeros_like(values[0])
        if output.logits is not None:
            scores = output.logits.softmax(-1)[rows, windows.labels].double()
        stacked = torch.stack((*values, scores))
        return torch.zeros(3, BINS, dtype=torch.float64).index_add_(1, windows.bins.cpu(), stacked.cpu())


def _means(spec: HeadSpec, sums: Tensor) -> dict[str, Any]:
    counts, ious, scores = sums.tolist()

    def mean(values: list[float], has_task: bool) -> list[float | None]:
        return [value / count if has_task and count else None for value, count in zip(values, counts, strict=True)]

    return {
        "windows": [int(count) for count in counts],
        "regressed_iou": mean(ious, spec.branch.regresses),
        "score": mean(scores, spec.branch.classifies),
    }
