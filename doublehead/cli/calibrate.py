"""`doublehead calibrate CHECKPOINT [options]`: find the gate of a Double-Head-Ext that costs next to no accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from doublehead.config import Fusion, to_dict
from doublehead.engine.data_options import EvaluationData, data_config
from doublehead.errors import UserError, config_errors, shown_to_user

PROGRAM = "doublehead calibrate"
FEW = 50  # images: with fewer, a tenth of an AP point means little


@dataclass(frozen=True)
class Options:
    """What the command line takes."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A model.safetensors, or the folder of a run; gate.json is written beside the weights (beside best.safetensors:
    best.gate.json)."""
    data: EvaluationData = field(default_factory=EvaluationData)
    most_loss: float = 0.1
    """The most that the gate may lose, in AP points (0 .. 100)."""
    held_out: tyro.conf.FlagCreatePairsOff[bool] = False
    """Choose on the first half of the images, and measure the loss on the second half too: on the images that chose a
    gate its loss looks smaller than it is."""
    fusion: Fusion | None = None
    """How the read-out `fused` joins the two classifiers; by default as trained."""
    gates: tuple[float, ...] = ()
    """The gates to try, each above 0 and below 1; by default 21 of them from 0.001 to 0.9."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace the gate.json of an earlier call."""
    device: str = "auto"
    """`auto`: CUDA where there is one, else CPU."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; exits with 2 on a user's error, with 1 if every gate loses too much."""
    with shown_to_user():
        description = (
            "Find, on images with boxes, the largest gate (--ext-gate) that loses at most --most-loss AP.\n"
            "It is stored: detect, evaluate and export take it with --ext-gate calibrated.  For Double-Head-Ext."
        )
        run(tyro.cli(Options, prog=PROGRAM, description=description, args=arguments))


class NoGate(UserError):
    """Every gate loses too much."""

    exit_code = 1


def run(options: Options) -> None:
    """Measure, choose, print and store; on this process and those beside it.

    Raises:
        UserError: an option, the checkpoint or the images cannot be used, or every gate loses too much.
    """
    gates = check_options(options)

    from doublehead.data import build_dataset  # only now: these import PyTorch
    from doublehead.engine.checkpoint import load_model
    from doublehead.engine.distributed import join_world
    from doublehead.engine.gate_file import check_gate_output, check_gateable, gate_path, write_gate
    from doublehead.engine.gates import GATES, format_curve, measure_gates
    from doublehead.engine.logs import counted_warnings, say

    path = gate_path(options.checkpoint)
    check_gate_output(path, options.overwrite)
    with join_world(options.device) as world, counted_warnings(shown=world.is_main):
        model, recipe, classes, _ = load_model(options.checkpoint)
        with config_errors():
            readout = model.detector.resolve_readout(recipe.model.detection.readout, options.fusion, 0.0)
            check_gateable(options.checkpoint, recipe.model.head.kind, readout)
            data = data_config(recipe.data, options.data)
            dataset = build_dataset(data, "val", classes=classes)
        if world.is_main:
            say(f"{options.checkpoint}: {recipe.name}, on {len(dataset)} images of {dataset.name}")
        curves = measure_gates(
            model.to(world.device), dataset, readout, gates or GATES, world,
            held_out=options.held_out, workers=data.workers, progress=world.is_main,
        )  # fmt: skip
        point = curves[0].largest(options.most_loss)
        if world.is_main:
            say(format_curve(curves[0], point.gate if point else None))
        if point is None:
            least = curves[0].points[1]
            raise world.shared(
                NoGate(
                    f"the smallest gate, {least.gate:g}, loses {least.loss:.2f} AP already, more than --most-loss "
                    f"{options.most_loss:g}: nothing is written"
                )
            )
        world.on_main(
            lambda: write_gate(path, model, readout, point, curves, options.most_loss, dataset.name, to_dict(data))
        )
        if world.is_main:
            say(summary(point, curves, options.most_loss))
            say(f"{path}: written; --ext-gate calibrated uses it")


def check_options(options: Options) -> tuple[float, ...]:
    """The gates to try, ascending; refuse numbers that cannot be.

    Raises:
        UserError: it names them.
    """
    if not 0 <= options.most_loss <= 100:
        raise UserError(f"--most-loss is {options.most_loss}, AP points from 0 to 100 are accepted")
    wrong = [gate for gate in options.gates if not 0 < gate < 1]
    if wrong:
        raise UserError(f"--gates has {wrong[0]:g}, scores above 0 and below 1 are accepted")
    return tuple(sorted(set(options.gates)))


def summary(point, curves, most_loss: float) -> str:
    """What was chosen and what it costs, in a few lines."""
    lines = [
        f"chosen: {point.gate:g}, the last gate before the first that loses more than {most_loss:g} AP; the conv-head "
        f"sees {100 * point.survivors:.1f} % of the RoIs"
    ]
    if len(curves) == 1:
        lines.append("note: its loss is measured on the images that chose it: --held-out measures it on others too")
    else:
        other = curves[1].at(point.gate)
        beyond = ", more than the bound" if other.loss > most_loss else ""
        lines.append(
            f"held out, {curves[1].images} images: AP {100 * curves[1].points[0].ap:.2f} without, "
            f"{100 * other.ap:.2f} with it: {round(other.loss, 2) + 0.0:.2f} lost{beyond}; survivors "
            f"{100 * other.survivors:.1f} %"
        )
    if curves[0].images < FEW:
        lines.append(f"note: {curves[0].images} images are few: differences of a tenth of an AP point are chance")
    return "\n".join(lines)
