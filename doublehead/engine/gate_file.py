"""`gate.json` beside a detector's weights: the gate that `doublehead calibrate` chose, and what it costs."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doublehead.config import DetectionConfig, Fusion, ReadOutName
from doublehead.engine.checkpoint import find_model
from doublehead.engine.gates import GateCurve, GatePoint
from doublehead.engine.schema import Mismatch, entries, number, text, whole
from doublehead.engine.sealed import path_beside, read_sealed, write_sealed
from doublehead.errors import CheckpointError, UserError, config_errors
from doublehead.version import __version__
from doublehead.weights.digest import of_weights

if TYPE_CHECKING:
    from doublehead.models import DoubleHeadRCNN
    from doublehead.models.readout import ReadOut

GATE_FILE = "gate.json"
CALIBRATED = "calibrated"
_FORMAT = "doublehead.gate/1"
_CONTENT = entries(
    {
        "weights": text,
        "detection": entries({}),
        "gate": number(0),
        "AP": entries({"without": number(0), "with": number(0)}),
        "loss": number(),
        "images": whole(1),
        "dataset": text,
    }
)


def gate_path(checkpoint: str | Path) -> Path:
    """Where the gate of a checkpoint lies: RUN/gate.json; beside RUN/best.safetensors it is RUN/best.gate.json.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    return path_beside(find_model(Path(checkpoint)), GATE_FILE)


def write_gate(
    path: Path,
    model: DoubleHeadRCNN,
    readout: ReadOut,
    point: GatePoint,
    curves: list[GateCurve],
    most_loss: float,
    dataset: str,
    data: dict[str, Any],
) -> None:
    """Write the chosen gate with its measurements.

    Args:
        point: the chosen one, of the first curve.
        curves: of the images that chose it, and of others, if any.
        dataset, data: the images' name and configuration.
    """
    chosen, *others = curves
    content = {
        "version": __version__,
        "weights": of_weights(model.state_dict()),
        "detection": _relevant(readout.detection),
        "most_loss": most_loss,
        **_described(chosen, point),
        "held_out": _described(others[0], others[0].at(point.gate)) if others else None,
        "dataset": dataset,
        "data": data,
        "curve": [one._asdict() for one in chosen.points],
    }
    write_sealed(path, _FORMAT, content)


def _described(curve: GateCurve, point: GatePoint) -> dict[str, Any]:
    return {
        "gate": point.gate,
        "AP": {"without": curve.points[0].ap, "with": point.ap},
        "loss": point.loss,
        "survivors": point.survivors,
        "images": curve.images,
    }


def read_gate(checkpoint: str | Path, model: DoubleHeadRCNN) -> dict[str, Any]:
    """The content of the checkpoint's `gate.json`: `gate`, `AP`, `loss`, `images`, `dataset`, ...

    Args:
        model: what `load_model` gave for the checkpoint, its weights unchanged.

    Raises:
        CheckpointError: the file is missing, damaged, edited, or of other weights.
    """
    path = gate_path(checkpoint)
    content = read_sealed(path, _FORMAT, f"doublehead calibrate {checkpoint}")
    again = f"doublehead calibrate {checkpoint} --overwrite"
    try:
        _CONTENT(content, "")
        if not 0 < content["gate"] < 1:
            raise Mismatch(f"gate: expected a score above 0 and below 1, got {content['gate']}")
    except Mismatch as error:
        raise CheckpointError(f"{path}: {error}; make it again: {again}") from error
    if content["weights"] != of_weights(model.state_dict()):
        raise CheckpointError(
            f"{path}: calibrated for other weights than those of {checkpoint}; make it again: {again}"
        )
    return content


def check_gateable(checkpoint: str | Path, kind: str, readout: ReadOut) -> None:
    """Refuse a detector, or a read-out, in which a gate does nothing.

    Raises:
        UserError: says which.
    """
    if kind != "double_head_ext":
        skips = "; it skips RoIs without a gate, exactly" if kind in ("double_head", "double_head_reverse") else ""
        raise UserError(f"{checkpoint}: its head is {kind!r}, and a gate is for 'double_head_ext'{skips}")
    if len(readout.sources.classes) < 2:
        used = readout.detection
        what = f"read-out {used.readout!r}" if used.readout != "fused" else f"fusion {used.fusion!r}"
        raise UserError(f"{checkpoint}: a gate is for the read-out 'fused' with two classifiers, not for {what}")


def find_gate(
    checkpoint: str | Path,
    model: DoubleHeadRCNN,
    ext_gate: float | str | None,
    readout: ReadOutName | None = None,
    fusion: Fusion | None = None,
) -> float | None:
    """The number that an option `ext_gate` stands for.

    Args:
        ext_gate: a number, which is returned; "calibrated"; None: as configured.
        readout, fusion: what the gate is for; None: as configured.

    Raises:
        UserError: "calibrated" for a read-out without a gate, or which it was not measured for.
        CheckpointError: see `read_gate`.
    """
    if ext_gate != CALIBRATED:
        return ext_gate
    config = model.config.detection
    asked = model.detector.resolve_readout(readout or config.readout, fusion)
    check_gateable(checkpoint, model.config.head.kind, asked)
    content = read_gate(checkpoint, model)
    mine = _relevant(asked.detection)
    other = [name for name, value in mine.items() if content["detection"].get(name) != value]
    if other:
        name = other[0]
        raise UserError(
            f"{gate_path(checkpoint)}: measured with detection.{name} {content['detection'].get(name)!r}, not "
            f"{mine[name]!r}; give a number, or calibrate for it"
        )
    return content["gate"]


def set_gate(checkpoint: str | Path, model: DoubleHeadRCNN, ext_gate: float | str | None) -> None:
    """Give a detector a gate, in the read-out that it has.

    Args:
        ext_gate: as for `find_gate`; None: nothing is changed.

    Raises:
        UserError: a number outside of 0 .. 1, or text other than "calibrated"; a gate would do nothing; or see
            `find_gate`.
    """
    if ext_gate is None:
        return
    if ext_gate != CALIBRATED and (isinstance(ext_gate, bool) or not isinstance(ext_gate, (int, float))):
        raise UserError(
            f"ext_gate is {ext_gate!r}: a score from 0 (no gate) to below 1, or {CALIBRATED!r}, is accepted"
        )
    used = model.detector.readout.detection
    gate = find_gate(checkpoint, model, ext_gate, used.readout, used.fusion)
    if gate:
        check_gateable(checkpoint, model.config.head.kind, model.detector.readout)
    with config_errors():
        model.set_readout(used.readout, used.fusion, gate)


def describe_gate(checkpoint: str | Path, model: DoubleHeadRCNN) -> str:
    """One line about the checkpoint's calibrated gate."""
    content = read_gate(checkpoint, model)
    loss = f"{round(content['loss'], 2) + 0.0:.2f}"
    return f"calibrated gate {content['gate']:g}: {loss} AP lost on {content['images']} images of {content['dataset']}"


def _relevant(detection: DetectionConfig) -> dict[str, Any]:
    """What the loss of a gate depends on, apart from the weights."""
    return {name: value for name, value in asdict(detection).items() if name not in ("ext_gate", "skip")}


def check_gate_output(path: Path, overwrite: bool) -> None:
    """Refuse, before the work, a `gate.json` that cannot be written or is there already.

    Raises:
        UserError: says why.
    """
    if os.path.lexists(path) and not path.is_file():
        raise UserError(f"{path}: in the way of the calibrated gate, and no file: move it away")
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists: add --overwrite to replace it")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"{path}: cannot be written: its folder is not writable")
