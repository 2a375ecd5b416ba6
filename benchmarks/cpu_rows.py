"""Which detectors are compared on a CPU, in which precision and under which runtime, and what is aimed at.

No torch here: `plot.py` reads it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

CASE = "detector: R50-FPN, 1 x 800 px, on a CPU"

FASTER, FC, DOUBLE, EXT = "Faster R-CNN", "fc kind", "Double-Head", "Double-Head-Ext"
DETECTORS = {
    FASTER: "torchvision's `fasterrcnn_resnet50_fpn`",
    FC: "the same weights converted, kind `fc`",
    DOUBLE: "Double-Head",
    EXT: "Double-Head-Ext",
}
SHORT = DETECTORS | {FASTER: "torchvision's Faster R-CNN", FC: "kind `fc`"}
EAGER, COMPILED, ACCELERATED, OURS = "torchvision", "torch.compile", "accelerate", "doublehead"
EXPORTED = ONNXRUNTIME, OPENVINO = "onnxruntime", "OpenVINO"
FP32, BF16, INT8, INT8_BF16 = "fp32", "bf16", "int8 heads, fp32", "int8 heads, bf16"
"""`INT8` names what the layers outside of the heads run in."""
WHOLE_INT8 = "int8"
"""All of the graph, as the runtime's own tools quantise it."""

ALL, QUARTER = "every RoI", "a quarter of the RoIs"
"""What the conv-head runs on: by the exact skip of Double-Head, or the gate of Ext."""


@dataclass(frozen=True)
class Row:
    """One detector, as a user would run it."""

    detector: str
    runtime: str
    precision: str = FP32
    rois: str = ALL
    headline: bool = True
    """Whether it is timed without --full."""

    @property
    def name(self) -> str:
        """What it is called in the record: what is not the ordinary is named."""
        if self.runtime in (EAGER, ACCELERATED):
            parts = [EAGER if self.runtime == EAGER else OURS]
        else:
            parts = [self.detector] + ([] if self.runtime == OURS else [self.runtime])
        if self.rois == QUARTER:
            parts.append("a quarter")
        return ", ".join(parts + ([] if self.precision == FP32 else [self.precision]))

    @property
    def exported(self) -> bool:
        return self.runtime in EXPORTED

    @property
    def in_bf16(self) -> bool:
        return self.precision in (BF16, INT8_BF16)

    @property
    def peer(self) -> str:
        """What `peers` calls it."""
        return self.runtime if self.runtime == ONNXRUNTIME else f"{self.runtime} {self.precision}"

    @property
    def weights(self) -> tuple[str, str]:
        """Whose model it is.  An exported Double-Head has the weights of which a quarter passes, and runs every RoI."""
        return self.detector, QUARTER if self.exported and self.detector == DOUBLE else self.rois

    @property
    def family(self) -> tuple[str, str]:
        """Rows of one family find the same things: torchvision's model and its conversion are one."""
        detector, rois = self.weights
        return (FASTER if detector == FC else detector), rois

    def described(self) -> dict[str, str]:
        """Its part of the record's details."""
        return {"detector": self.detector, "runtime": self.runtime, "precision": self.precision, "rois": self.rois}


def _in(*precisions: str, headline: bool = True, **fields: str) -> list[Row]:
    return [Row(precision=precision, headline=headline, **fields) for precision in precisions]


def _exported(detector: str, headline: bool) -> list[Row]:
    return [
        *_in(FP32, BF16, detector=detector, runtime=OPENVINO),
        *_in(WHOLE_INT8, detector=detector, runtime=OPENVINO, headline=False),
        *_in(FP32, BF16, detector=detector, runtime=ONNXRUNTIME, headline=headline),
    ]


ROWS = [
    *_in(FP32, BF16, detector=FASTER, runtime=EAGER),
    *_in(FP32, BF16, detector=FASTER, runtime=COMPILED, headline=False),
    *_in(FP32, BF16, detector=FASTER, runtime=ACCELERATED),
    *_in(FP32, BF16, detector=FC, runtime=OURS),
    *_in(INT8, INT8_BF16, detector=FC, runtime=OURS, headline=False),
    *_exported(FC, True),
    *_in(FP32, BF16, detector=DOUBLE, runtime=OURS, rois=QUARTER),
    *_in(INT8, INT8_BF16, detector=DOUBLE, runtime=OURS, rois=QUARTER, headline=False),
    *_in(FP32, BF16, detector=DOUBLE, runtime=OURS, headline=False),
    *_exported(DOUBLE, False),
    *_in(FP32, BF16, INT8, INT8_BF16, detector=EXT, runtime=OURS),
    *_in(FP32, BF16, INT8, INT8_BF16, detector=EXT, runtime=OURS, rois=QUARTER),
    *_exported(EXT, True),
]


def words(row: dict[str, str]) -> str:
    """A row's description in a line: "Double-Head, a quarter of the RoIs, bf16"."""
    by = {EAGER: [], ACCELERATED: ["accelerated"], OURS: []}.get(row["runtime"], [row["runtime"]])
    rois = [row["rois"]] if row["rois"] != ALL else []
    return ", ".join([SHORT[row["detector"]], *by, *rois, row["precision"]])


# ---------------------------------------------------------------------------------------------
# Targets


@dataclass(frozen=True)
class Target:
    """`ours` at least `ratio` times as fast as `peer`: names of rows."""

    ours: str
    peer: str
    ratio: float

    def verdict(self, providers: dict[str, dict[str, Any]]) -> tuple[float | None, str]:
        """The measured ratio, or None, and one word or the reason why there is none."""
        for name in (self.ours, self.peer):
            if "median_ms" not in (found := providers.get(name, {})):
                return None, f"not measured: {found.get('missing', 'no such row in the record')}"
        measured = providers[self.peer]["median_ms"] / providers[self.ours]["median_ms"]
        return measured, "met" if measured >= self.ratio else "missed"


def _name(detector: str, runtime: str, precision: str = FP32, rois: str = ALL) -> str:
    return Row(detector, runtime, precision, rois).name


def _targets() -> Sequence[Target]:
    eager, eager16 = _name(FASTER, EAGER), _name(FASTER, EAGER, BF16)
    yield Target(_name(FASTER, ACCELERATED), eager, 1.5)
    yield Target(_name(FASTER, ACCELERATED, BF16), eager16, 1.4)
    yield Target(_name(DOUBLE, OURS, BF16, QUARTER), eager16, 1.0)
    yield Target(_name(EXT, OURS, BF16), eager, 0.9)
    for rest in (INT8_BF16, INT8):
        yield Target(_name(EXT, OURS, rest), eager, 1.3)
        yield Target(_name(EXT, OURS, rest, QUARTER), eager16, 1.1)
    for detector in (FC, EXT):
        for precision in (FP32, BF16):
            for runtime in (ONNXRUNTIME, OPENVINO):
                yield Target(_name(detector, OURS, precision), _name(detector, runtime, precision), 1.0)
        yield Target(_name(detector, OURS, INT8_BF16), _name(detector, OPENVINO, WHOLE_INT8), 1.0)
    for detector in (DOUBLE, EXT):
        for precision in (FP32, BF16):
            yield Target(_name(detector, OURS, precision, QUARTER), _name(detector, OPENVINO, precision), 2.0)


TARGETS = list(_targets())
