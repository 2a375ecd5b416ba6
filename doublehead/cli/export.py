"""`doublehead export CHECKPOINT OUT [options]`: a detector as a program that needs no model code."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from doublehead.cli.outputs import check_output
from doublehead.cli.readouts import ExtGate, set_readout
from doublehead.config import Fusion, ImageConfig, Precision, ReadOutName
from doublehead.engine.data_options import EvaluationData
from doublehead.errors import UserError, config_errors, shown_to_user

if TYPE_CHECKING:
    from doublehead.models import Detector

PROGRAM = "doublehead export"
Kind = Literal["aoti", "onnx", "openvino"]
SUFFIXES: dict[Kind, str] = {"aoti": ".pt2", "onnx": ".onnx", "openvino": ".xml"}


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line takes."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A model.safetensors, or the folder of a run."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The file to write, ending in .pt2 (aoti), .onnx or .xml (openvino; its weights go beside it, into .bin); it must
    not exist."""
    format: Kind | None = None
    """`aoti`: a package compiled by AOTInductor for this kind of machine; `onnx`: for onnxruntime, TensorRT and others;
    `openvino`: for OpenVINO on CPUs.  By default OUT's ending decides."""
    precision: Precision = "fp32"
    """What OpenVINO computes in (.xml): `bf16` where the processor has it; `int8`: layers with weights, quantised by
    NNCF for the images of --data.  Other files are `fp32`; an ONNX file's runtime may choose another one."""
    int8_images: int = 64
    """How many images int8's ranges are taken from, evenly spread over the data."""
    data: EvaluationData = dataclasses.field(default_factory=EvaluationData)
    batch: int = 1
    """Number of images that the program takes at a time."""
    dynamic_batch: bool = False
    """Take any number of images up to --batch (packages)."""
    height: int | None = None
    """Height of the padded images in pixels; by default what the recipe's landscape pictures need."""
    width: int | None = None
    """Width of the padded images in pixels.  Give the longer side for both to serve portrait pictures too."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the program will run (packages); `auto`: CUDA where there is one, else CPU."""
    readout: ReadOutName | None = None
    """Which head classifies and which gives the boxes (Ext models)."""
    fusion: Fusion | None = None
    """How `fused` joins the two classifiers (Ext models)."""
    ext_gate: ExtGate | None = None
    """Leave out RoIs whose best fc-score is not above this (Ext models, read-out `fused`); approximate.  `calibrated`:
    the gate that `doublehead calibrate` stored beside the weights."""
    check: bool = True
    """Load the written program and compare it with the model on a random input before OUT appears; for int8, measure
    what it costs in AP on the images of --data."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; exits with 2 on a user's error, with 1 if the program's results are not the model's."""
    with shown_to_user():
        description = "Write a detector as a program: pixels and sizes in; boxes, scores, labels and count out."
        run(tyro.cli(Options, prog=PROGRAM, description=description, args=arguments))


def run(options: Options) -> None:
    """Export, check, and only then give the file its name.

    Raises:
        UserError: OUT or an option cannot be used, the checkpoint cannot be read, or a package is missing.
    """
    out, kind = Path(options.out), _format(options)
    check_output(options.out, "OUT")
    for file in written_files(out, kind):
        if os.path.lexists(file):
            raise UserError(f"{file} exists: give another name, or remove it first")
    _check_numbers(options, kind)

    import torch  # only now: these take seconds to import

    from doublehead.engine.checkpoint import load_model
    from doublehead.engine.logs import say
    from doublehead.exporting import compiler, onnx_file, openvino_file, package
    from doublehead.exporting.description import describe
    from doublehead.exporting.program import DetectorProgram, example_input

    if kind == "openvino":
        openvino_file.check_installed(int8=options.precision == "int8")
    else:
        (compiler.check_compiler if kind == "aoti" else onnx_file.check_installed)()
    device = _device(options.device, kind, torch.cuda.is_available())
    model, recipe, classes, category_ids = load_model(options.checkpoint)
    with config_errors():
        set_readout(options.checkpoint, model, options, recipe.model.detection)
    detection = model.detector.readout.detection
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, detection=detection))
    height, width = input_size(recipe.model.image, options.height, options.width)
    change = None
    if options.precision != "fp32" and kind == "openvino":
        from doublehead.cli.export_precision import PrecisionChange

        given = (options.precision, recipe.data, options.data, classes, options.int8_images, options.check)
        change = PrecisionChange(*given)

    say(f"{options.checkpoint}: {recipe.name}, {len(classes)} classes; {options.batch} x 3 x {height} x {width} pixels")
    began = time.monotonic()
    program = DetectorProgram(model.detector, device, plain=kind != "aoti")
    example = example_input(options.batch, height, width, device)
    note = describe(kind, recipe, classes, category_ids, example[0].shape, device, options.dynamic_batch)
    if kind == "aoti":
        say(f"compiling for {device} ({note['machine']}): this takes some minutes")
    else:
        say("translating to ONNX: this takes about a minute")
    write = {
        "aoti": package.write_package, "onnx": onnx_file.write_onnx, "openvino": openvino_file.write_openvino,
    }[kind]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="doublehead-export-", ignore_cleanup_errors=True) as folder:
        draft = Path(folder) / f"detector{SUFFIXES[kind]}"
        write(program, example, note, draft)
        say(f"done in {time.monotonic() - began:.0f} s")
        if options.check:
            say(f"checked against the model on a random input: {check(draft, model.detector)}")
        if change:
            change(draft)
        publish(draft, out, kind)
    size = sum(file.stat().st_size for file in written_files(out, kind))
    say(f"{out}: {size / 2**20:.1f} MiB{' with its .bin' * (kind == 'openvino')}; doublehead.exporting.load opens it")


def written_files(out: Path, kind: Kind) -> list[Path]:
    """What an export writes: OUT, and an OpenVINO file's weights."""
    return [out, out.with_suffix(".bin")] if kind == "openvino" else [out]


def publish(draft: Path, out: Path, kind: Kind) -> None:
    """Give the written files their names, all or none; OUT comes last."""
    from doublehead.engine.files import replacing

    with contextlib.ExitStack() as undo:
        for source, file in reversed(list(zip(written_files(draft, kind), written_files(out, kind), strict=True))):
            with replacing(file) as temporary:
                shutil.copyfile(source, temporary)
            undo.callback(file.unlink, missing_ok=True)
        undo.pop_all()


def input_size(image: ImageConfig, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width of the program's input, as asked for or as landscape pictures need.

    Raises:
        UserError: one of them is not a multiple of `image.size_divisible`.
    """
    step = image.size_divisible
    for name, value in (("--height", height), ("--width", width)):
        if value is not None and (value < step or value % step):
            raise UserError(f"{name} is {value}, a multiple of {step} (image.size_divisible) is accepted")
    default_height, default_width = (math.ceil(side / step) * step for side in (image.min_size[-1], image.max_size))
    return height or default_height, width or default_width


def check(path: Path, detector: Detector) -> str:
    """Load an exported file and compare it with `detector` on random images, without TF32; returns the result in words.

    Raises:
        WrongProgram: their results differ.
    """
    import torch

    from doublehead.exporting import load
    from doublehead.exporting.program import DetectorProgram, differences, exact_float32, example_input

    exported, number = load(path), 0
    program = DetectorProgram(detector, exported.device)
    most, *size = exported.shape
    for batch in (most, 1) if exported.dynamic_batch else (most,):
        pixels, sizes = example_input(batch, *size, device=exported.device, seed=1)
        with torch.no_grad(), exact_float32():
            found, expected = exported(pixels, sizes), program(pixels, sizes)
        if problem := differences(found, expected):
            raise WrongProgram(
                f"the exported program does not compute what the model does: {problem}; nothing was written "
                f"(--no-check writes it all the same)"
            )
        number += int(found.count.sum())
    if number == 0:
        return "neither finds anything, so this compares little"
    return f"the same {number} detections"


class WrongProgram(UserError):
    """The exported program's results are not the model's."""

    exit_code = 1


def _check_numbers(options: Options, kind: Kind) -> None:
    if options.batch < 1:
        raise UserError(f"--batch is {options.batch}, at least 1 is accepted")
    if options.dynamic_batch and (kind != "aoti" or options.batch == 1):
        raise UserError(
            "--dynamic-batch is for packages (.pt2), with a --batch of at least 2, the most images at a time"
        )
    if options.precision != "fp32" and kind != "openvino":
        runs = "an ONNX file's runtime may choose another than fp32" if kind == "onnx" else "packages compute in fp32"
        raise UserError(f"--precision {options.precision} is for OpenVINO files (.xml); {runs}")
    if options.precision == "fp16":
        raise UserError("--precision fp16: OpenVINO files (.xml) have fp32, bf16 or int8")
    if options.precision != "int8" and options.data != EvaluationData():
        raise UserError("--data.* are the images that --precision int8 is calibrated on: give both, or neither")
    if options.precision != "int8" and options.int8_images != Options.int8_images:
        raise UserError("--int8-images is for --precision int8: give both, or neither")
    if options.int8_images < 1:
        raise UserError(f"--int8-images is {options.int8_images}, at least 1 is accepted")


def _format(options: Options) -> Kind:
    suffix = Path(options.out).suffix
    by_suffix = {ending: kind for kind, ending in SUFFIXES.items()}
    kind = options.format or by_suffix.get(suffix)
    if kind is None or suffix != SUFFIXES[kind]:
        accepted = SUFFIXES[kind] if kind else ", ".join(by_suffix).replace(", .xml", " or .xml")
        raise UserError(f"OUT is {options.out}: its name must end in {accepted}")
    return kind


def _device(asked: str, kind: str, has_cuda: bool) -> str:
    if kind == "onnx" and asked == "cuda":
        raise UserError("--device cuda: an ONNX file is for any device; leave --device out")
    if kind == "openvino" and asked == "cuda":
        raise UserError("--device cuda: OpenVINO runs on the CPU; leave --device out, or export a package (.pt2)")
    if kind != "aoti":
        return "cpu"
    if asked == "cuda" and not has_cuda:
        raise UserError("--device cuda: torch sees no CUDA device; a package is made on the kind of machine it is for")
    return asked if asked != "auto" else "cuda" if has_cuda else "cpu"
