"""The read-out that a command line asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

from doublehead.config import DetectionConfig, Fusion, ReadOutName

if TYPE_CHECKING:
    from doublehead.models import DoubleHeadRCNN

ExtGate = float | Literal["calibrated"]
"""A gate, or that of the checkpoint's gate.json."""


class ReadOutOptions(Protocol):
    """The options of a command that can change the read-out; None: as trained."""

    readout: ReadOutName | None
    fusion: Fusion | None
    ext_gate: ExtGate | None


def set_readout(checkpoint: str, model: DoubleHeadRCNN, options: ReadOutOptions, trained: DetectionConfig) -> None:
    """Change an Ext model's read-out where the command line asks for it."""
    if options.readout or options.fusion or options.ext_gate is not None:
        from doublehead.engine.gate_file import find_gate  # only now: it imports PyTorch

        readout = options.readout or ("fused" if options.fusion else trained.readout)
        fusion = options.fusion or trained.fusion
        model.set_readout(readout, fusion, find_gate(checkpoint, model, options.ext_gate, readout, fusion))
