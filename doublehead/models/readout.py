"""The read-out: which heads of a detector give the classes and the boxes, and on which RoIs they have to run.

Everything that decides it lies here: the heads of each kind and their tasks, what their losses weigh, and from these
the `ReadOut` that `Detector.readout` holds.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..config import DetectionConfig, Fusion, HeadKind, LossConfig, ModelConfig, ReadOutName
from ..ops.score_fusion import FUSIONS


class Branch(NamedTuple):
    """One head of a kind: its tower, and the tasks it is trained for."""

    tower: Literal["fc", "conv", "conv5"]
    classifies: bool
    regresses: bool


BRANCHES: dict[HeadKind, dict[str, Branch]] = {
    "fc": {"fc": Branch("fc", True, True)},
    "conv": {"conv": Branch("conv", True, True)},
    "double_fc": {"fc_1": Branch("fc", True, False), "fc_2": Branch("fc", False, True)},
    "double_conv": {"conv_1": Branch("conv", True, False), "conv_2": Branch("conv", False, True)},
    "double_head": {"fc": Branch("fc", True, False), "conv": Branch("conv", False, True)},
    "double_head_reverse": {"fc": Branch("fc", False, True), "conv": Branch("conv", True, False)},
    "double_head_ext": {"fc": Branch("fc", True, True), "conv": Branch("conv", True, True)},
    "conv5": {"conv5": Branch("conv5", True, True)},
}
"""Branch name -> branch, for every kind of PAPER Table 1, Ext, and the C4 baseline of Table 4."""


def task_weights(kind: HeadKind, config: LossConfig) -> dict[str, tuple[float, float]]:
    """Branch name -> weights of its classification and of its regression loss (Equations 1-3).

    Only Ext divides a head's weight between two tasks (by `l_fc`, `l_conv`).  In every other kind
    each task has its tower's whole weight, `w_fc` or `w_conv`, as in Table 1.
    """
    weights = {}
    for name, branch in BRANCHES[kind].items():
        share = (float(branch.classifies), float(branch.regresses))
        if kind == "double_head_ext":
            share = (config.l_fc, 1 - config.l_fc) if branch.tower == "fc" else (1 - config.l_conv, config.l_conv)
        whole = config.w_fc if branch.tower == "fc" else config.w_conv
        weights[name] = (whole * share[0], whole * share[1])
    return weights


class Sources(NamedTuple):
    """Which branches a read-out takes its classes and its boxes from."""

    classes: tuple[str, ...]
    boxes: str


EXT_SOURCES: dict[ReadOutName, Sources] = {
    "fused": Sources(("fc", "conv"), "conv"),
    "split": Sources(("fc",), "conv"),
    "fc": Sources(("fc",), "fc"),
    "conv": Sources(("conv",), "conv"),
}
"""The four ways to read out one Ext model (PAPER Figure 6)."""


def resolve_sources(kind: HeadKind, readout: ReadOutName, fusion: Fusion, loss: LossConfig) -> Sources:
    """Find the branches a read-out needs, and make sure that they were trained.

    Kinds other than Ext have one classifier and one regressor; their only read-out is `fused`.

    Raises:
        ValueError: the kind does not have this read-out, or its loss weights leave one of the
            needed tasks untrained (Equation 4 holds only for l_fc != 0 and l_conv != 1).
    """
    branches = BRANCHES[kind]
    if kind != "double_head_ext":
        if readout != "fused":
            raise ValueError(f"detection.readout: {readout!r} needs head.kind 'double_head_ext', got {kind!r}")
        classes = next(name for name, branch in branches.items() if branch.classifies)
        boxes = next(name for name, branch in branches.items() if branch.regresses)
        return Sources((classes,), boxes)
    if readout not in EXT_SOURCES:
        raise ValueError(f"detection.readout: expected one of {', '.join(EXT_SOURCES)}, got {readout!r}")
    if fusion not in FUSIONS:
        raise ValueError(f"detection.fusion: expected one of {', '.join(FUSIONS)}, got {fusion!r}")
    sources = EXT_SOURCES["split" if readout == "fused" and fusion == "none" else readout]
    weights = task_weights(kind, loss)
    untrained = [f"{name}-head's classifier" for name in sources.classes if weights[name][0] == 0]
    if weights[sources.boxes][1] == 0:
        untrained.append(f"{sources.boxes}-head's box regressor")
    if untrained:
        raise ValueError(
            f"detection.readout {readout!r} with fusion {fusion!r} needs the {' and the '.join(untrained)}, which the "
            f"loss weights leave untrained (l_fc = {loss.l_fc}, l_conv = {loss.l_conv}); choose another read-out"
        )
    return sources


@dataclass(frozen=True)
class ReadOut:
    """How a detector's heads are read out.

    Raises:
        ValueError: a gate outside of 0 .. 1.
    """

    sources: Sources
    """The heads whose classes and whose boxes are used."""
    detection: DetectionConfig
    """How they are used: name, fusion, gate, skip, thresholds and limits."""

    def __post_init__(self) -> None:
        gate = self.detection.ext_gate
        if not 0 <= gate < 1:
            raise ValueError(f"detection.ext_gate: expected 0 (off) or a score below 1, got {gate}")

    def replace(self, **changes: float | int | bool) -> ReadOut:
        """The same heads with other options of `DetectionConfig`: `skip`, `ext_gate`, thresholds and limits."""
        return dataclasses.replace(self, detection=dataclasses.replace(self.detection, **changes))

    @property
    def gated(self) -> bool:
        """Whether the first classifier's score alone decides which RoIs are dropped, although two are fused."""
        return self.detection.ext_gate > 0 and len(self.sources.classes) == 2

    @property
    def skips(self) -> bool:
        """Whether the head that gives the boxes needs only the RoIs with a class above `least_score`."""
        return self.gated or (self.detection.skip and self.sources.boxes not in self.sources.classes)

    @property
    def least_score(self) -> float:
        """The first classifier's score above which a RoI may become a detection, for read-outs that skip RoIs."""
        return self.detection.ext_gate if self.gated else self.detection.score_threshold


def resolve_readout(
    config: ModelConfig, readout: ReadOutName | None = None, fusion: Fusion | None = None, ext_gate: float | None = None
) -> ReadOut:
    """The read-out of a model; see `DetectionConfig`.  None: as configured.

    Raises:
        ValueError: the heads were not trained for it (see `resolve_sources`), or a gate outside of 0 .. 1.
    """
    detection = config.detection
    readout = detection.readout if readout is None else readout
    fusion = fusion or detection.fusion
    ext_gate = detection.ext_gate if ext_gate is None else ext_gate
    sources = resolve_sources(config.head.kind, readout, fusion, config.loss)
    return ReadOut(sources, dataclasses.replace(detection, readout=readout, fusion=fusion, ext_gate=ext_gate))
