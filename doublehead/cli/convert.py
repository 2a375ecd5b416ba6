"""`doublehead convert SRC DST [options]`: another project's checkpoint becomes a model of this library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from doublehead.errors import UserError, shown_to_user

PROGRAM = "doublehead convert"
DESCRIPTION = (
    "Convert a detector of torchvision, Detectron2, MMDetection, maskrcnn-benchmark or the authors' Double-Head R-CNN: "
    "its weights and its conventions, so that it finds what it found there. The format is detected; every tensor is "
    "used, or named with the reason why it is not; nothing in the file is executed."
)


@dataclass(frozen=True)
class Options:
    """What the command line takes."""

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """The checkpoint: .pth, .pkl or .safetensors."""
    dst: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """Folder for model.safetensors and recipe.json; new or empty."""
    format: Literal["torchvision", "detectron2", "mmdet", "maskrcnn_benchmark"] | None = None
    """The project it comes from (the authors' Double-Head: maskrcnn_benchmark); detected by default."""
    classes: str | None = None
    """File with the class names, one a line, without background; else the checkpoint's, or COCO's or Pascal VOC's."""
    style: Literal["caffe", "pytorch"] | None = None
    """The ResNet of Detectron2 or MMDetection: `caffe` (BGR, stride in 1x1 convolutions) or `pytorch` (RGB, in 3x3)."""
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FIELD=VALUE...")] = ()
    """Fields of the recipe that the weights cannot tell: model.backbone.norm_eps=1e-5 'model.image.min_size=[640]'."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; exits with 2 on a user's error."""
    with shown_to_user():
        run(tyro.cli(Options, prog=PROGRAM, description=DESCRIPTION, args=arguments))


def run(options: Options) -> None:
    """Convert, print the report, and write the folder; on an error nothing is written.

    Raises:
        UserError: the checkpoint cannot be read or converted, or the folder holds files; the message says why.
    """
    from doublehead.config import to_dict  # only now: these import PyTorch
    from doublehead.engine.checkpoint import MODEL_FILE, save_model
    from doublehead.engine.files import RECIPE_FILE, new_run_folder, write_json
    from doublehead.interop.classes import read_names
    from doublehead.interop.formats import convert
    from doublehead.interop.loading import read_checkpoint
    from doublehead.interop.mapping import ConversionError
    from doublehead.interop.report import describe

    folder = Path(options.dst)
    check_empty(folder)
    names = read_names(options.classes) if options.classes is not None else None
    checkpoint = read_checkpoint(options.src)
    try:
        converted = convert(
            checkpoint, project=options.format, style=options.style, classes=names, settings=options.set
        )  # fmt: skip
    except ConversionError as error:
        raise ConversionError(f"{options.src}: {error}") from error
    print(describe(checkpoint, converted))
    new_run_folder(converted.recipe.name, folder)
    save_model(folder / MODEL_FILE, converted.model, converted.recipe, converted.classes, converted.category_ids)
    write_json(folder / RECIPE_FILE, to_dict(converted.recipe))
    print(f"written: {folder / MODEL_FILE} and {folder / RECIPE_FILE}")


def check_empty(folder: Path) -> None:
    """Refuse a folder that holds files, before the work and not after it.

    Raises:
        UserError: the folder holds files, is a file, or cannot be read.
    """
    try:
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"DST {folder}: already holds files: give a new or an empty folder")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"DST {folder}: a file: give a new or an empty folder")
    except OSError as error:
        raise UserError(f"DST {folder}: cannot be read: {error.strerror}") from error
