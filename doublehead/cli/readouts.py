"""The read-out that a command line asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from doublehead.config import DetectionConfig, Fusion, ReadOutName

if TYPE_CHECKING:
    from torch.nn import Module


class ReadOutOptions(Protocol):
    """The options of a command that can change the read-out; None: as trained."""

    readout: ReadOutName | None
    fusion: Fusion | None
    ext_gate: float | None


def set_readout(model: Module, options: ReadOutOptions, trained: DetectionConfig) -> None:
    """Change an Ext model's read-out where the command line asks for it."""
    if options.readout or options.fusion or options.ext_gate is not None:
        readout = options.readout or ("fused" if options.fusion else trained.readout)
        model.set_readout(readout, options.fusion or trained.fusion, options.ext_gate)
