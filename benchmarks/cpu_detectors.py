"""The detectors of `cpu_rows`: one call for each row, or the reason why it is missing.

Weights are random (`detectors`).  What decides how many RoIs need a box is set: the background's bias in Double-Head's
classifier, the gate in Ext.
"""

from __future__ import annotations

import contextlib
import copy
import signal
from collections.abc import Callable, Iterator, Sequence

import harness
import torch
from cpu_rows import (
    ACCELERATED,
    ALL,
    BF16,
    COMPILED,
    DOUBLE,
    EXT,
    FASTER,
    FC,
    FP32,
    INT8,
    INT8_BF16,
    ONNXRUNTIME,
    QUARTER,
    ROWS,
    Row,
)
from detector_checks import plain
from detectors import models
from heads import in_int8
from peers import Peers, peers
from torch import Tensor, nn

import doublehead
from doublehead.models import DoubleHeadRCNN

COMPILE_SECONDS = 240
"""torch.compile of torchvision's detector is given up after that."""

Found = tuple[Row, list[dict[str, Tensor]]]


class Detectors:
    """The detectors of some rows, made when they are asked for.

    Args:
        images: what they will be given, of `side` pixels; the first one scales the weights and calibrates int8.
        side, proposals: as for `detectors.models`.
        rows: those of the run.
    """

    def __init__(self, images: list[Tensor], side: int, proposals: int, rows: Sequence[Row] = ROWS) -> None:
        found = models(images, side, proposals)
        self.images, self.originals, self.rows = images, found, rows
        quarter = copy.deepcopy(found[DOUBLE])
        let_pass(quarter, images, 0.25)
        let_pass(found[DOUBLE], images, 1.0)
        gated = sharing(found[EXT])
        gated.detector.readout = gated.detector.readout.replace(ext_gate=scores(gated, images).quantile(0.75).item())
        self.weights: dict[tuple[str, str], nn.Module] = {
            (FASTER, ALL): found["torchvision"],
            (FC, ALL): found["fc kind"],
            (DOUBLE, ALL): found[DOUBLE],
            (DOUBLE, QUARTER): quarter,
            (EXT, ALL): found[EXT],
            (EXT, QUARTER): gated,
        }
        self._references: dict[tuple[str, str], list[dict[str, Tensor]]] = {}
        self._peers: dict[str, Peers] = {}

    def reference(self, family: tuple[str, str]) -> list[dict[str, Tensor]]:
        """What a family's detector finds in fp32, module by module."""
        if family not in self._references:
            model = self.weights[family]
            with torch.inference_mode():
                self._references[family] = (model if family[0] == FASTER else plain(model))(self.images)
        return self._references[family]

    def model(self, row: Row) -> nn.Module | str:
        """The detector of a row that PyTorch runs, or the reason why there is none."""
        if row.in_bf16 and (reason := harness.lacks_bf16()):
            return reason
        model = sharing(self.weights[row.weights])  # folded weights are remembered for one precision
        if row.runtime == ACCELERATED:
            return doublehead.accelerate(model)
        if row.runtime == COMPILED:
            return compiled(model, row, self.images)
        if row.precision in (INT8, INT8_BF16):
            return in_int8(model, self.images)
        return model

    def exported(self, row: Row) -> Callable[[], list[dict[str, Tensor]]] | str:
        """A call of an exported detector on the images, or the reason why there is none."""
        if row.runtime == ONNXRUNTIME and row.precision != FP32:
            return f"onnxruntime's kernels for the CPU have no {row.precision} on x86"
        if row.in_bf16 and (reason := harness.lacks_bf16()):
            return reason
        if row.detector not in self._peers:  # one file serves all
            names = [each.peer for each in self.rows if each.detector == row.detector and each.exported]
            if harness.lacks_bf16():
                names = [name for name in names if BF16 not in name]
            self._peers[row.detector] = peers(self.weights[row.weights], self.images, names)
        found = self._peers[row.detector]
        return found.calls.get(row.peer) or found.missing[row.peer]

    def call(self, row: Row, model: nn.Module | None = None) -> Callable[[], Found] | str:
        """What is timed, images in and detections out; or the reason why it cannot be. `model`: of `model(row)`."""
        detect = self.exported(row) if row.exported else lambda: model(self.images)
        if isinstance(detect, str):
            return detect

        def run() -> Found:
            with torch.inference_mode(), precision(row):
                return row, detect()

        return run


def precision(row: Row) -> contextlib.AbstractContextManager:
    """Autocast for what PyTorch runs in bf16."""
    return torch.autocast("cpu", torch.bfloat16) if row.in_bf16 and not row.exported else contextlib.nullcontext()


def sharing(model: nn.Module) -> nn.Module:
    """A copy with the same parameters and buffers, and nothing else in common."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


# ---------------------------------------------------------------------------------------------
# How many RoIs pass


def classified(model: DoubleHeadRCNN, images: list[Tensor]) -> tuple[Tensor, float]:
    """The first classifier's logits of the first image's proposals, `Tensor[R, classes]`; the share that got boxes."""
    head = model.detector.heads[model.detector.sources.classes[0]]
    seen = []
    hook = head.register_forward_hook(lambda module, inputs, output: seen.append(output.logits))
    with torch.inference_mode():
        (found,) = model.detect_each(images[:1], [model.detector.readout])[0]
    hook.remove()
    return seen[0][: found["rois"]].clone(), (found["box_rois"] / found["rois"]).item()


def scores(model: DoubleHeadRCNN, images: list[Tensor]) -> Tensor:
    """The best foreground score of each proposal: `Tensor[R]`."""
    return classified(model, images)[0].softmax(1)[:, 1:].amax(1)


def let_pass(model: DoubleHeadRCNN, images: list[Tensor], share: float) -> None:
    """Move the background's bias so that this share of the RoIs has a class above the score threshold."""
    logits = classified(model, images)[0].double()
    background, foreground = logits[:, 0], logits[:, 1:]
    # best / (sum of all + background) = threshold, solved for what the background's logit may rise by
    most = foreground.amax(1, keepdim=True)
    others = (foreground - most).exp().sum(1)
    room = (1 / model.detector.readout.least_score - others).clamp(min=1e-300).log() + most[:, 0] - background
    shift = room.quantile(1 - share) if share < 1 else room.min() - 1
    classifier = model.detector.heads[model.detector.sources.classes[0]].classifier
    with torch.no_grad():
        classifier.bias[0] += shift.to(classifier.bias.dtype)


def shares_of_rois(model: DoubleHeadRCNN, images: list[Tensor]) -> dict[str, float]:
    """Of the first image's RoIs, in the precision of the call: which share may be detected, and which got boxes.

    Fewer get boxes than may be detected where the best detections are sure before.
    """
    logits, ran = classified(model, images)
    best = logits.softmax(1)[:, 1:].amax(1)
    passing = (best > model.detector.readout.least_score).float().mean().item()
    return {"passing": round(passing, 4), "share": round(ran, 4)}


# ---------------------------------------------------------------------------------------------
# Other forms


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
def at_most(seconds: float) -> Iterator[None]:
    """TimeoutError where the block takes longer."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
