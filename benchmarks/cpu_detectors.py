"""The detectors of `cpu_rows`: one call for each row, or the reason why it is missing.

Weights are random (`detectors`).  What decides how many RoIs need a box is set: the background's bias in Double-Head's
classifier, the gate in Ext.
"""

from __future__ import annotations

import contextlib
import copy
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import harness
import peers
import torch
from cpu_rows import ACCELERATED, ALL, BF16, COMPILED, DOUBLE, EXT, FASTER, FC, INT8, INT8_BF16, QUARTER, Row
from detector_checks import plain
from detectors import models
from torch import Tensor, nn

import doublehead
from doublehead.exporting import ExportedDetector
from doublehead.models import DoubleHeadRCNN
from doublehead.models.quantized import int8_support, observe, use_int8

COMPILE_SECONDS = 240
"""torch.compile of torchvision's detector is given up after that."""


class Detectors:
    """The models of all rows, made when they are asked for.

    Args:
        images: what they will be given, of `side` pixels; the first one scales the weights and calibrates int8.
        side, proposals: as for `detectors.models`.
    """

    def __init__(self, images: list[Tensor], side: int, proposals: int) -> None:
        found = models(images, side, proposals)
        self.images, self.originals = images, found
        quarter = copy.deepcopy(found[DOUBLE])
        let_pass(quarter, images, 0.25)
        let_pass(found[DOUBLE], images, 1.0)
        gated = sharing(found[EXT])
        gated.detector.readout = gated.detector.readout.replace(ext_gate=scores(gated, images).quantile(0.75).item())
        self.models: dict[tuple[str, str], nn.Module] = {
            (FASTER, ALL): found["torchvision"],
            (FC, ALL): found["fc kind"],
            (DOUBLE, ALL): found[DOUBLE],
            (DOUBLE, QUARTER): quarter,
            (EXT, ALL): found[EXT],
            (EXT, QUARTER): gated,
        }
        self._references: dict[tuple[str, str], list[dict[str, Tensor]]] = {}
        self._exported: dict[str, peers.Exported] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="doublehead-benchmark-")

    def reference(self, family: tuple[str, str]) -> list[dict[str, Tensor]]:
        """What a family's detector finds in fp32, module by module."""
        if family not in self._references:
            model = self.models[family]
            with torch.inference_mode():
                self._references[family] = (model if family[0] == FASTER else plain(model))(self.images)
        return self._references[family]

    def model(self, row: Row) -> nn.Module | ExportedDetector | str:
        """The row's detector, or the reason why there is none."""
        if row.precision in (BF16, INT8_BF16) and (reason := harness.lacks_bf16()):
            return reason
        if row.exported:
            if reason := peers.missing(row.runtime, row.precision):
                return reason
            return self._file(row).detector(row.runtime, row.precision)
        model = sharing(self.models[row.weights])  # folded weights are remembered for one precision
        if row.runtime == ACCELERATED:
            return doublehead.accelerate(model)
        if row.runtime == COMPILED:
            return compiled(model, row, self.images)
        if row.precision in (INT8, INT8_BF16):
            return in_int8(model, self.images)
        return model

    def call(self, row: Row, model: nn.Module | ExportedDetector) -> Callable[[], tuple[Row, list[dict[str, Tensor]]]]:
        """What is timed: images in, detections out."""
        detect = model.detect if isinstance(model, ExportedDetector) else model

        def run() -> tuple[Row, list[dict[str, Tensor]]]:
            with torch.inference_mode(), precision(row):
                return row, detect(self.images)

        return run

    def _file(self, row: Row) -> peers.Exported:
        """The exported detector, translated once."""
        if row.detector not in self._exported:
            folder = Path(self._folder.name) / row.detector
            folder.mkdir()
            self._exported[row.detector] = peers.Exported(self.models[row.weights], self.images, folder)
        return self._exported[row.detector]


def precision(row: Row) -> contextlib.AbstractContextManager:
    """Autocast for what PyTorch runs in bf16."""
    bf16 = row.precision in (BF16, INT8_BF16) and not row.exported
    return torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()


def sharing(model: nn.Module) -> nn.Module:
    """A copy with the same parameters and buffers, and nothing else in common."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


# ---------------------------------------------------------------------------------------------
# How many RoIs pass


def classified(model: DoubleHeadRCNN, images: list[Tensor]) -> Tensor:
    """The first classifier's logits of the first image's proposals: `Tensor[R, classes]`."""
    head = model.detector.heads[model.detector.sources.classes[0]]
    seen = []
    hook = head.register_forward_hook(lambda module, inputs, output: seen.append(output.logits))
    with torch.inference_mode():
        (found,) = model.detect_each(images[:1], [model.detector.readout])[0]
    hook.remove()
    return seen[0][: found["rois"]].clone()


def scores(model: DoubleHeadRCNN, images: list[Tensor]) -> Tensor:
    """The best foreground score of each proposal: `Tensor[R]`."""
    return classified(model, images).softmax(1)[:, 1:].amax(1)


def let_pass(model: DoubleHeadRCNN, images: list[Tensor], share: float) -> None:
    """Move the background's bias so that this share of the RoIs has a class above the score threshold."""
    logits = classified(model, images).double()
    background, foreground = logits[:, 0], logits[:, 1:]
    # best / (sum of all + background) = threshold, solved for what the background's logit may rise by
    most = foreground.amax(1, keepdim=True)
    others = (foreground - most).exp().sum(1)
    room = (1 / model.detector.readout.least_score - others).clamp(min=1e-300).log() + most[:, 0] - background
    shift = room.quantile(1 - share) if share < 1 else room.min() - 1
    classifier = model.detector.heads[model.detector.sources.classes[0]].classifier
    with torch.no_grad():
        classifier.bias[0] += shift.to(classifier.bias.dtype)


def share_passing(model: DoubleHeadRCNN, images: list[Tensor]) -> float:
    """The share of the first image's RoIs that the head with the boxes runs on, in the precision of the call."""
    with torch.inference_mode():
        (found,) = model.detect_each(images[:1], [model.detector.readout])[0]
    return round((found["box_rois"] / found["rois"]).item(), 4)


# ---------------------------------------------------------------------------------------------
# Other forms


def in_int8(model: DoubleHeadRCNN, images: list[Tensor]) -> DoubleHeadRCNN | str:
    """The same model with its heads in int8, calibrated on these images; or why it cannot be."""
    if int8_support().level == "none":
        return int8_support().reason
    with observe(model) as observed, torch.inference_mode():
        model(images)
    use_int8(model, observed.scales())
    return model


def compiled(model: nn.Module, row: Row, images: list[Tensor]) -> nn.Module | str:
    """The model compiled, after calls that compile for these images; or why that failed."""
    by_compiler = torch.compile(model)
    try:
        with at_most(COMPILE_SECONDS), torch.inference_mode(), precision(row):
            for _ in range(2):  # the second call compiles again where sizes came out of the first one's data
                by_compiler(images)
    except Exception as error:  # whatever the compiler raises is the finding
        return f"torch.compile: {type(error).__name__}, {(str(error).splitlines() or [''])[0][:120]}"
    return by_compiler


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """TimeoutError where the block takes longer."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
