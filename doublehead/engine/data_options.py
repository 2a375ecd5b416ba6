"""Options that several commands share: the images that a trained detector runs on."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from doublehead.config import DataConfig, DataFormat
from doublehead.errors import UserError


@dataclass(frozen=True)
class EvaluationData:
    """The images; options that are not given are those of training."""

    root: str | None = None
    """Folder of the data set."""
    format: DataFormat | None = None
    val_split: str | None = None
    val_images: int | None = None
    """Use only the first N images."""
    image_size: int | None = None
    """Side of a generated image (shapes only)."""
    on_bad_record: Annotated[Literal["error", "skip"] | None, tyro.conf.arg(aliases=("--on-bad-record",))] = None
    """What to do with a broken image or annotation: stop with its name, or leave it out and count it."""
    max_skipped: float | None = None
    """Largest share of the images, and of the objects, that on-bad-record `skip` may leave out (it always may leave out
    three; 0: none)."""
    max_pixels: int | None = None
    """Refuse larger images, before they are decoded."""
    outside_root: tyro.conf.FlagCreatePairsOff[bool] = False
    """Read images whose names in the annotations (absolute, or with `..`) lead out of the data set's folder."""
    workers: int | None = None
    """Loader processes per rank."""


def data_config(trained: DataConfig, given: EvaluationData) -> DataConfig:
    """The data of training, changed by the options of the command line.

    A folder that is given to a detector trained on generated pictures is read in whichever layout it has.

    Raises:
        UserError: the data set's folder is not given, that of training does not exist, or it would not be read.
    """
    values = {f.name: getattr(given, f.name) for f in fields(given)}
    config = replace(trained, **{name: v for name, v in values.items() if v is not None and v is not False})
    if given.root is not None and given.format == "shapes":
        raise UserError(f"--data.format shapes draws its own pictures and would not read --data.root {given.root}")
    if given.root is not None and config.format == "shapes":
        config = replace(config, format="auto")
    if config.format == "shapes":
        return config
    if trained.format == "shapes":  # the number of pictures to draw limits no data set
        config = replace(config, val_images=given.val_images)
    if given.root is None and config.format != trained.format:
        raise UserError(f"--data.format {config.format} needs --data.root: training was on {trained.format}")
    if config.root is None:
        raise UserError(f"--data.root is missing: the folder of the {config.format} data set")
    if given.root is None and not Path(config.root).expanduser().is_dir():
        raise UserError(f"the data set of training, {config.root}, is not here: give --data.root")
    return config
