"""`doublehead export CHECKPOINT OUT [options]`: a detector as a program that needs no model code."""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from doublehead.cli.outputs import check_output
from doublehead.cli.readouts import set_readout
from doublehead.config import Fusion, ImageConfig, Precision, ReadOutName
from doublehead.errors import UserError, config_errors, shown_to_user

if TYPE_CHECKING:
    from doublehead.models import Detector

PROGRAM = "doublehead export"
SUFFIXES = {"aoti": ".pt2", "onnx": ".onnx"}


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line takes."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A model.safetensors, or the folder of a run."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The file to write, ending in .pt2 (aoti) or .onnx; it must not exist."""
    format: Literal["aoti", "onnx"] | None = None
    """`aoti`: a package compiled by AOTInductor for this kind of machine; `onnx`: for onnxruntime, TensorRT and others.
    By default OUT's ending decides."""
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
    ext_gate: float | None = None
    """Leave out RoIs whose best fc-score is not above this (Ext models, read-out `fused`); approximate."""
    precision: Precision = "fp32"
    """What a package computes in: `bf16`, or for CUDA `fp16` (other formats leave that to their runtime)."""
    check: bool = True
    """Load the written program and compare it with the model on a random input before OUT appears."""


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
    if out.exists():
        raise UserError(f"{out} exists: give another name, or remove it first")
    if options.batch < 1:
        raise UserError(f"--batch is {options.batch}, at least 1 is accepted")
    if options.dynamic_batch and (kind == "onnx" or options.batch == 1):
        raise UserError(
            "--dynamic-batch is for packages (.pt2), with a --batch of at least 2, the most images at a time"
        )

    check_precision(options.precision, kind)

    import torch  # only now: these take seconds to import

    from doublehead.engine.checkpoint import load_model
    from doublehead.engine.files import replacing
    from doublehead.engine.logs import say
    from doublehead.exporting import onnx_file, package
    from doublehead.exporting.description import describe
    from doublehead.exporting.program import DetectorProgram, example_input

    (package.check_compiler if kind == "aoti" else onnx_file.check_installed)()
    device = _device(options.device, kind, torch.cuda.is_available())
    if options.precision == "fp16" and device == "cpu":
        raise UserError("--precision fp16: packages for CPUs compute in fp32 or bf16")
    model, recipe, classes, category_ids = load_model(options.checkpoint)
    with config_errors():
        set_readout(model, options, recipe.model.detection)
    detection = model.detector.readout.detection
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, detection=detection))
    height, width = input_size(recipe.model.image, options.height, options.width)

    say(f"{options.checkpoint}: {recipe.name}, {len(classes)} classes; {options.batch} x 3 x {height} x {width} pixels")
    began = time.monotonic()
    program = DetectorProgram(model.detector, device, plain=kind == "onnx")
    example = example_input(options.batch, height, width, device)
    note = describe(kind, recipe, classes, category_ids, example[0].shape, device, options.dynamic_batch)
    if kind == "aoti":
        say(f"compiling for {device} ({note['machine']}): this takes some minutes")
    else:
        say("translating to ONNX: this takes about a minute")
    with tempfile.TemporaryDirectory(prefix="doublehead-export-", ignore_cleanup_errors=True) as folder:
        draft = Path(folder) / f"detector{SUFFIXES[kind]}"
        (package.write_package if kind == "aoti" else onnx_file.write_onnx)(program, example, note, draft)
        say(f"done in {time.monotonic() - began:.0f} s")
        if options.check:
            say(f"checked against the model on a random input: {check(draft, model.detector)}")
        with replacing(out) as temporary:
            shutil.copyfile(draft, temporary)
    say(f"{out}: {out.stat().st_size / 2**20:.1f} MiB; doublehead.exporting.load opens it")


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
    """Load an exported file and compare it with `detector` on random images; returns the result in words.

    Raises:
        WrongProgram: their results differ.
    """
    import torch

    from doublehead.exporting import load
    from doublehead.exporting.program import DetectorProgram, differences, example_input

    exported, number = load(path), 0
    program = DetectorProgram(detector, exported.device)
    most, *size = exported.shape
    for batch in (most, 1) if exported.dynamic_batch else (most,):
        pixels, sizes = example_input(batch, *size, device=exported.device, seed=1)
        found = exported(pixels, sizes)
        with torch.no_grad():
            expected = program(pixels, sizes)
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


def check_precision(precision: Precision, kind: str) -> None:
    """
    Raises:
        UserError: files of this kind are not written in this precision.
    """
    if precision == "int8":
        raise UserError(
            "--precision int8: exported files have none; detect, evaluate and doublehead.load run the model in it"
        )
    if precision != "fp32" and kind != "aoti":
        raise UserError(
            f"--precision {precision}: .{kind} files are written in fp32, and the runtime chooses what to compute in; "
            "leave --precision out"
        )


def _format(options: Options) -> Literal["aoti", "onnx"]:
    suffix = Path(options.out).suffix
    by_suffix = {ending: kind for kind, ending in SUFFIXES.items()}
    kind = options.format or by_suffix.get(suffix)
    if kind is None or suffix != SUFFIXES[kind]:
        accepted = SUFFIXES[kind] if kind else " or ".join(by_suffix)
        raise UserError(f"OUT is {options.out}: its name must end in {accepted}")
    return kind


def _device(asked: str, kind: str, has_cuda: bool) -> str:
    if kind == "onnx":
        if asked == "cuda":
            raise UserError("--device cuda: an ONNX file is for any device; leave --device out")
        return "cpu"
    if asked == "cuda" and not has_cuda:
        raise UserError("--device cuda: torch sees no CUDA device; a package is made on the kind of machine it is for")
    return asked if asked != "auto" else "cuda" if has_cuda else "cpu"
