"""`doublehead evaluate CHECKPOINT [options]`: measure a trained detector on a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from doublehead.cli.outputs import check_folder, check_output, same_file
from doublehead.cli.readouts import ExtGate, set_readout
from doublehead.config import DetectionConfig, Fusion, ModelConfig, Precision, ReadOutName, to_dict
from doublehead.engine.data_options import EvaluationData, data_config
from doublehead.errors import UserError, config_errors, shown_to_user

if TYPE_CHECKING:
    from doublehead.engine.precision import Mode
    from doublehead.models.readout import ReadOut

PROGRAM = "doublehead evaluate"
ALL_READOUTS: tuple[ReadOutName, ...] = ("fused", "split", "fc", "conv")


@dataclass(frozen=True)
class Options:
    """What the command line takes."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A model.safetensors, or the folder of a run."""
    data: EvaluationData = field(default_factory=EvaluationData)
    readout: ReadOutName | None = None
    """Which head classifies and which gives the boxes (Ext models)."""
    fusion: Fusion | None = None
    """How `fused` joins the two classifiers (Ext models)."""
    readouts: tuple[Literal["fused", "split", "fc", "conv", "all"], ...] = ()
    """Several read-outs in one pass over the images, side by side (Figure 6; Ext models); `all`: every one that the
    loss weights train."""
    fusions: tuple[Fusion, ...] = ()
    """Several fusions of the fused read-out in one pass (Table 3); with --readouts, they replace its `fused`."""
    ext_gate: ExtGate | None = None
    """Leave out RoIs whose best fc-score is not above this (Ext models, read-out `fused`); approximate.  `calibrated`:
    the gate that `doublehead calibrate` stored beside the weights."""
    precision: Precision = "fp32"
    """`bf16` and `fp16`: 16 bits; `int8`: the layers of the heads that `doublehead quantize` found fit for it, on a
    CPU, with the difference to the AP of fp32."""
    out: str | None = None
    """Write the detections to this file, in COCO's submission format; for a single read-out."""
    metrics: str | None = None
    """Write the metrics to this file; `doublehead tables` includes RUN/metrics-NAME.json, with all of its read-outs."""
    pictures: str | None = None
    """Draw into this folder, which is made: precision over recall, the confusion of classes, the scores of right and
    wrong detections, and some images with ground truth and detections; for a single read-out."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace the files that --out and --metrics name, and those of --pictures."""
    device: str = "auto"
    """`auto`: CUDA where there is one, else CPU."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; exits with 2 on a user's error."""
    with shown_to_user():
        description = (
            "Measure a detector: COCO's twelve numbers, AP per class, and VOC's AP for voc data.\n"
            "VOC's difficult objects count neither as found nor as missed: in COCO's numbers they are crowds."
        )
        run(tyro.cli(Options, prog=PROGRAM, description=description, args=arguments))


def run(options: Options) -> None:
    """Evaluate on this process and those beside it."""
    from doublehead.data import build_dataset  # only now: these import PyTorch
    from doublehead.engine.checkpoint import load_model
    from doublehead.engine.distributed import join_world
    from doublehead.engine.gate_file import describe_gate
    from doublehead.engine.logs import counted_warnings, say
    from doublehead.engine.precision import set_precision
    from doublehead.engine.results import RESULT_FILES

    check_options(options)
    check_output(options.out, "--out", options.overwrite)
    check_output(options.metrics, "--metrics", options.overwrite)
    check_folder(options.pictures, RESULT_FILES, "--pictures", options.overwrite)
    with join_world(options.device) as world, counted_warnings(shown=world.is_main):
        model, recipe, classes, _ = load_model(options.checkpoint)
        with config_errors():
            readouts = find_readouts(model, options, recipe.model)
            if not readouts:
                set_readout(options.checkpoint, model, options, recipe.model.detection)
            data = data_config(recipe.data, options.data)
            dataset = build_dataset(data, "val", classes=classes)
        mode = set_precision(model, options.precision, world.device, options.checkpoint)
        if world.is_main:
            say(f"{options.checkpoint}: {recipe.name}, on {len(dataset)} images of {dataset.name}")
            if mode.note:
                say(f"note: {mode.note}")
            if options.ext_gate == "calibrated":
                say(describe_gate(options.checkpoint, model))
            if "all" in options.readouts and (left := untrained(readouts)):
                say(f"left out, as the loss weights do not train them: {', '.join(left)}")
        settings = {"voc": dataset.is_voc, "workers": data.workers, "progress": world.is_main}
        with mode.autocast(world.device):
            if readouts:
                measure_each(model.to(world.device), dataset, readouts, world, options, mode, to_dict(data), settings)
            else:
                measure(model.to(world.device), dataset, world, options, mode, to_dict(data), settings)


def measure(model, dataset, world, options: Options, mode: Mode, data: dict, settings: dict[str, Any]) -> None:
    """Evaluate the model with its present read-out; write the requested files and print the metrics."""
    from doublehead.engine.evaluator import evaluate_in_detail
    from doublehead.engine.files import write_json
    from doublehead.engine.logs import say
    from doublehead.engine.metrics_text import format_metrics

    metrics, results, details = evaluate_in_detail(model, dataset, world, **settings)
    reference = None
    if mode.used == "int8":
        from doublehead.cli.float_reference import float_ap

        reference = float_ap(model, dataset, world, mode, settings)
    if options.out:
        world.on_main(lambda: write_json(options.out, results, indent=None))
    if options.metrics:
        used = {"detection": readout_used(model.detector.readout.detection), "data": data} | precision_used(mode)
        used |= {"fp32": reference._asdict()} if reference else {}
        world.on_main(lambda: write_json(options.metrics, used | metrics))
    if world.is_main:
        say(format_metrics(metrics))
        if reference:
            say(f"\n{reference.difference('int8', metrics)}")
        if options.out:
            say(f"\n{len(results)} detections written to {options.out}")
    if options.pictures:
        folder, title = Path(options.pictures), f"{Path(options.checkpoint).name} on {dataset.name}"
        world.on_main(lambda: draw(folder, title, model, dataset, world.device, details))


def draw(folder: Path, title: str, model, dataset, device, details) -> None:
    """Draw the pictures of --pictures, and name them."""
    from doublehead.engine.logs import say
    from doublehead.engine.results import draw_results

    folder.mkdir(exist_ok=True)
    say(f"\n{folder}: {', '.join(draw_results(folder, title, model, dataset, device, details))}")
    if details is None:
        say("there is no ground truth: no precision, confusion and scores to draw")


def measure_each(
    model, dataset, readouts: dict[str, ReadOut], world, options: Options, mode: Mode, data: dict,
    settings: dict[str, Any],
) -> None:  # fmt: skip
    """Evaluate several read-outs in one pass; write the requested file and print the metrics."""
    from doublehead.engine.evaluator import evaluate_each
    from doublehead.engine.files import write_json
    from doublehead.engine.logs import say
    from doublehead.engine.metrics_text import format_each

    metrics = evaluate_each(model, dataset, readouts, world, **settings)
    references = {}
    if mode.used == "int8":
        from doublehead.cli.float_reference import float_ap_of_each

        references = float_ap_of_each(model, dataset, readouts, world, mode, settings)
    if options.metrics:
        each = {
            name: {"detection": readout_used(readouts[name].detection)} | precision_used(mode) | values
            for name, values in metrics.items()
        }
        for name, reference in references.items():
            each[name]["fp32"] = reference._asdict()
        world.on_main(lambda: write_json(options.metrics, {"data": data, "readouts": each}))
    if world.is_main:
        say(format_each(metrics))
        for name, reference in references.items():
            say(reference.difference(f"{name}: int8", metrics[name]))


def check_options(options: Options) -> None:
    """Refuse options that exclude each other.

    Raises:
        UserError: it names them.
    """
    if options.out and options.metrics and same_file(options.out, options.metrics):
        raise UserError(f"--out and --metrics are both {options.out}: give each a file of its own")
    several = "--readouts" if options.readouts else "--fusions" if options.fusions else None
    if several is None:
        return
    if options.readout:
        raise UserError(f"--readout and {several} exclude each other: give all read-outs to --readouts")
    if options.fusions and options.fusion:
        raise UserError("--fusion and --fusions exclude each other: give all fusions to --fusions")
    if options.fusions and options.readouts and not {"fused", "all"} & set(options.readouts):
        raise UserError(f"--fusions are for the fused read-out, --readouts {' '.join(options.readouts)} has none")
    if options.out:
        raise UserError(f"--out holds the detections of one read-out: leave out {several}, or --out")
    if options.pictures:
        raise UserError(f"--pictures shows one read-out: leave out {several}, or --pictures")


def find_readouts(model, options: Options, trained: ModelConfig) -> dict[str, ReadOut]:
    """Name -> `Detector.resolve_readout` of each read-out of --readouts and --fusions; empty without these.

    Raises:
        UserError: the head has only one read-out.
        ValueError: a requested read-out was not trained.
    """
    if not (options.readouts or options.fusions):
        return {}
    kind = trained.head.kind
    if kind != "double_head_ext":
        raise UserError(
            f"{options.checkpoint}: its head is {kind!r}, which has one read-out; --readouts and --fusions need "
            f"'double_head_ext'"
        )
    from doublehead.engine.gate_file import find_gate

    fusions = options.fusions or (options.fusion or trained.detection.fusion,)
    gate = [find_gate(options.checkpoint, model, options.ext_gate, "fused", fusion) for fusion in fusions][0]
    found = {}
    for readout in ALL_READOUTS if "all" in options.readouts else options.readouts or ("fused",):
        for fusion in fusions if readout == "fused" else fusions[:1]:
            name = f"fused-{fusion}" if readout == "fused" and options.fusions else readout
            try:
                found[name] = model.detector.resolve_readout(readout, fusion, gate)
            except ValueError:
                if readout in options.readouts or not options.readouts:
                    raise
    if not found:  # `all` of a model that trains none: resolving says why
        model.detector.resolve_readout("fused", fusions[0], gate)
    return found


def untrained(readouts: dict[str, ReadOut]) -> list[ReadOutName]:
    """The read-outs that `all` leaves out."""
    return [name for name in ALL_READOUTS if name not in {used.detection.readout for used in readouts.values()}]


def precision_used(mode: Mode) -> dict[str, str]:
    """The part of a metrics file that says the precision; nothing for fp32, as files had before there were others."""
    return {} if mode.used == "fp32" else {"precision": mode.used}


def readout_used(used: DetectionConfig) -> dict[str, str | float]:
    """The part of a `DetectionConfig` that the command line may change."""
    return {"readout": used.readout, "fusion": used.fusion, "ext_gate": used.ext_gate}
