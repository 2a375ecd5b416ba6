"""`doublehead quantize CHECKPOINT [options]`: find which layers run in 8 bits, and what that costs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from doublehead.engine.data_options import EvaluationData, data_config
from doublehead.errors import UserError, config_errors, shown_to_user

PROGRAM = "doublehead quantize"
DESCRIPTION = (
    "Prepare a detector for --precision int8 on CPUs: record the ranges of its heads' layers on images of the training "
    "split, measure AP in fp32 and int8 on the validation split, return layers that hurt to float, and write int8.json "
    "beside the checkpoint. The checkpoint itself stays as it is."
)


@dataclass(frozen=True)
class QuantizeData(EvaluationData):
    """The images; options that are not given are those of training."""

    train_split: str | None = None
    """The split of the calibration images; none of them is measured on."""


@dataclass(frozen=True)
class Options:
    """What the command line takes."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A model.safetensors, or the folder of a run."""
    data: QuantizeData = field(default_factory=QuantizeData)
    images: int | None = None
    """Calibration images, spread over the training split; by default 64, or all if it has fewer."""
    most_loss: float = 0.3
    """The most AP that int8 may lose on the validation split, in points (0 .. 100).  Layers return to float until it
    does not lose more."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace the int8.json that is there."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; exits with 2 on a user's error, with 1 if no layer can run in int8 within the bound."""
    with shown_to_user():
        run(tyro.cli(Options, prog=PROGRAM, description=DESCRIPTION, args=arguments))


def run(options: Options) -> None:
    """Calibrate, measure, choose, and only then write.

    Raises:
        UserError: an option, the checkpoint or the data cannot be used, or this machine cannot run int8.
    """
    check_options(options)
    from doublehead.data import build_dataset  # only now: these import PyTorch
    from doublehead.engine import quantizing
    from doublehead.engine.checkpoint import load_model
    from doublehead.engine.distributed import join_world
    from doublehead.engine.int8_file import check_has_layers, int8_path, write_int8
    from doublehead.engine.logs import counted_warnings, say
    from doublehead.engine.precision import resolve_precision

    path = int8_path(options.checkpoint)
    check_free(path, options.overwrite)
    with join_world("cpu") as world, counted_warnings():
        if world.size > 1:
            raise UserError("quantization runs on one process: leave torchrun out")
        model, recipe, classes, _ = load_model(options.checkpoint)
        check_has_layers(options.checkpoint, model)
        mode = resolve_precision("int8", world.device)
        if mode.used != "int8":
            raise UserError(f"this machine cannot run int8, nor measure it: {int8_reason()}")
        with config_errors():
            data = data_config(recipe.data, options.data)
            training = build_dataset(data, "train", classes=classes)
            validation = build_dataset(data, "val", classes=classes)
        check_apart(training, validation)
        truth = validation.coco_ground_truth()
        if not truth["annotations"]:
            raise UserError(f"{validation.name}: no boxes, so that there is no AP to measure: give --data.val-split")
        images, names = quantizing.calibration_images(training, options.images)
        say(f"{options.checkpoint}: {recipe.name}; calibrated on {len(images)} images of {training.name}, measured on "
            f"{len(validation)} of {validation.name}")  # fmt: skip
        if mode.note:
            say(f"note: {mode.note}")
        scales = quantizing.measure_scales(model, images)
        result = measured(model, scales, images, validation, world, mode, options.most_loss / 100, data.workers)
        fp32, choice = result
        write_int8(path, content(options, model, scales, fp32, choice, validation, training, names, mode))
        say(table(fp32, choice, len(scales)))
        say(f"\n{path}: used by --precision int8 and doublehead.load(..., precision='int8')")


def measured(model, scales, images, validation, world, mode, most_loss: float, workers: int) -> tuple[float, Any]:
    """AP in fp32, and the choice of layers."""
    from doublehead.engine import quantizing
    from doublehead.engine.evaluator import evaluate
    from doublehead.engine.logs import say
    from doublehead.models import quantized

    def measure_ap() -> float:
        return evaluate(model, validation, world, workers=workers, progress=True)[0]["AP"] or 0.0

    def measure_int8() -> float:
        with mode.autocast(world.device):
            return measure_ap()

    quantized.use_float(model)
    say("measuring fp32")
    fp32 = measure_ap()
    say(f"AP {100 * fp32:.2f}")
    choice = quantizing.choose_layers(
        model, scales, measure_int8,
        lambda: quantizing.output_errors(model, images[: quantizing.ORDER_IMAGES], scales), fp32, most_loss, say,
    )  # fmt: skip
    return fp32, choice


def content(options: Options, model, scales, fp32, choice, validation, training, names, mode) -> dict[str, Any]:
    """What is written, but for the format and the checksum."""
    from doublehead.engine.quantizing import ground_truth_digest, readout_of
    from doublehead.models import quantized
    from doublehead.ops.processor import processor
    from doublehead.version import __version__
    from doublehead.weights.digest import of_weights

    return {
        "doublehead": __version__,
        "weights": of_weights(model.state_dict()),
        "scales": dict(scales),
        "left_out": [entry._asdict() for entry in choice.left_out],
        "most_loss": options.most_loss,
        "measured": {
            "fp32": fp32, "int8": choice.int8, "int8_all_layers": choice.int8_all_layers, "images": len(validation),
            "data": validation.name, "ground_truth": ground_truth_digest(validation),
            "readout": readout_of(model.detector.readout.detection),
            "bits": quantized.int8_support().bits,
            "rest": "fp32" if mode.dtype is None else "bf16", "processor": processor().name,
        },
        "calibration": {"images": len(names), "data": training.name, "files": names},
    }  # fmt: skip


def table(fp32: float, choice, layers: int) -> str:
    """The result in a few lines."""
    rows = [("fp32", fp32), ("int8", choice.int8)]
    if choice.left_out:
        rows.append(("int8, all layers", choice.int8_all_layers))
    lines = ["", f"{'':18}{'AP':>6}  {'difference':>10}"]
    for name, ap in rows:
        lines.append(f"{name:18}{100 * ap:6.2f}  " + (f"{100 * (ap - fp32):+10.2f}" if name != "fp32" else "").rstrip())
    lines += ["", f"in int8: {layers - len(choice.left_out)} of {layers} layers"]
    lines += [
        f"in float: {entry.layer} (AP {100 * entry.AP_before:.2f} -> {100 * entry.AP_after:.2f}; alone in int8 it "
        f"changes the outputs by {100 * entry.output_error:.1f} %)"
        for entry in choice.left_out
    ]
    return "\n".join(line.rstrip() for line in lines)


def check_options(options: Options) -> None:
    """
    Raises:
        UserError: a number is not accepted.
    """
    if options.images is not None and options.images < 1:
        raise UserError(f"--images is {options.images}, at least 1 is accepted")
    if not 0 <= options.most_loss <= 100:
        raise UserError(f"--most-loss is {options.most_loss}, 0 .. 100 is accepted (points of AP)")


def check_free(path: Path, overwrite: bool) -> None:
    """Refuse a file that exists or cannot be written, before the work and not after it.

    Raises:
        UserError: says why.
    """
    if path.is_dir() or (path.parent.is_dir() and not os.access(path.parent, os.W_OK | os.X_OK)):
        raise UserError(f"{path}: cannot be written")
    if os.path.lexists(path) and not overwrite:
        raise UserError(f"{path}: exists; --overwrite measures again and replaces it")


def check_apart(training, validation) -> None:
    """Refuse to measure on the calibration images.

    Raises:
        UserError: both splits are the same.
    """
    if training.name == validation.name and set(training.file_names) & set(validation.file_names):
        raise UserError(
            f"{training.name}: calibration and validation images must differ: give --data.train-split another split"
        )


def int8_reason() -> str:
    """Why int8 cannot run here."""
    from doublehead.models import quantized

    return quantized.int8_support().reason
