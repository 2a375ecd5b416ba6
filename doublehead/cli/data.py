"""`doublehead data DIR`: count what a data set holds, and draw a sheet of its pictures."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

from doublehead.cli.outputs import check_output, same_file
from doublehead.config import DataConfig
from doublehead.errors import UserError, config_errors, one_line, shown_to_user

PROGRAM = "doublehead data"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
DEFAULTS = DataConfig()


@dataclass(frozen=True)
class DataOptions:
    """How the folder is read; the options of `doublehead train`."""

    root: str | None = None
    """The same as DIR."""
    format: Literal["auto", "coco", "voc", "yolo", "labelme"] = "auto"
    """`auto`: find out the layout."""
    train_split: str = DEFAULTS.train_split
    """Name of the training split."""
    val_split: str = DEFAULTS.val_split
    """Name of the validation split."""
    classes: tuple[str, ...] | None = None
    """Count these classes alone, in this order."""
    val_share: float = DEFAULTS.val_share
    """The share of the images to validate on where the data have one split alone."""
    split_seed: int = DEFAULTS.split_seed
    """The draw that divides a single split."""
    train_images: int | None = None
    """Read only the first N images of the split."""
    val_images: int | None = None
    """Read only the first N images of the split."""
    max_pixels: int = DEFAULTS.max_pixels
    """A larger image is a bad record."""
    outside_root: tyro.conf.FlagCreatePairsOff[bool] = False
    """Read images whose names in the annotations (absolute, or with `..`) lead out of the folder."""


@dataclass(frozen=True)
class Options:
    """What the command line takes."""

    dir: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")] = None
    """Folder of the data set."""
    data: DataOptions = field(default_factory=DataOptions)
    out: str | None = None
    """Draw the sheet to this file; without it data-NAME.png in the current folder."""
    json: str | None = None
    """Write the counts to this file too."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace the files that --out and --json name."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; exits with 1 if one of the two splits cannot be read, with 2 on another user's error."""
    with shown_to_user():
        description = (
            "Count what a data set holds (images, boxes by class and size, bad records, pictures that occur twice) "
            "and draw a sheet of pictures with their boxes. Bad records are counted and left out."
        )
        if not run(tyro.cli(Options, prog=PROGRAM, description=description, args=arguments)):
            raise SystemExit(1)


def run(options: Options) -> bool:
    """Count, print, draw; returns whether both splits could be read.

    Raises:
        UserError: an option or a file to write cannot be used, or nothing of the folder can be read.
    """
    config = data_config(options)
    out = options.out or f"data-{_name(config.root)}.png"
    check_outputs(out, options)

    from doublehead.engine.data_sheet import draw_sheet  # only now: these import PyTorch
    from doublehead.engine.data_summary import as_json, as_text, open_counted, remarks, summarize
    from doublehead.engine.files import write_json
    from doublehead.engine.pictures import save_picture
    from doublehead.engine.repeated import find_repeated

    with config_errors():
        opened = open_counted(config)
    if opened.said:
        print(f"{one_line(opened.said)}\n")
    splits = {name: summarize(dataset, opened.notes[name]) for name, dataset in opened.splits.items()}
    repeated = find_repeated({name: dataset.paths for name, dataset in opened.splits.items()})
    print(as_text(splits))
    sheet, unreadable = draw_sheet(opened.splits)
    lines = [f"{name}: cannot be read: {error}" for name, error in opened.failed.items()]
    lines += [*remarks(splits, repeated), *unreadable]
    if lines:
        print("\n" + "\n".join(f"- {one_line(line)}" for line in lines))
    save_picture(out, sheet)
    print(f"\npictures with their boxes: {one_line(out)}")
    if options.json:
        write_json(options.json, as_json(opened.said, splits, repeated))
        print(f"counts: {one_line(options.json)}")
    if not opened.failed:
        line = training_line(options, config, any(summary.bad for summary in splits.values()))
        print(f"to train: {one_line(line)}")
    return not opened.failed


def data_config(options: Options) -> DataConfig:
    """The data that the options name.

    Raises:
        UserError: no folder is given, or two.
    """
    given = {f.name: getattr(options.data, f.name) for f in fields(options.data)}
    if options.dir is not None and given["root"] is not None:
        raise UserError(f"DIR {options.dir} and --data.root {given['root']} are the same: give one")
    root = given["root"] = options.dir if options.dir is not None else given["root"]
    if root is None:
        raise UserError(f"the folder of the data set is missing: {PROGRAM} DIR")
    return DataConfig(**given)


def check_outputs(out: str, options: Options) -> None:
    """Refuse files that cannot be written, or exist, before the work.

    Raises:
        UserError: it names the option.
    """
    if Path(out).suffix.lower() not in PICTURES:
        raise UserError(f"--out {out}: the name of a picture is accepted, ending in {' '.join(PICTURES)}")
    if options.json and same_file(out, options.json):
        raise UserError(f"--out and --json are both {out}: give each a file of its own")
    check_output(out, "--out", options.overwrite)
    check_output(options.json, "--json", options.overwrite)


def training_line(options: Options, config: DataConfig, bad: bool) -> str:
    """The command that trains on what was counted."""
    words = ["doublehead", "train", "--data.root", config.root]
    for one in fields(DataOptions):
        value, default = getattr(options.data, one.name), one.default
        if one.name == "root" or value == default:
            continue
        words.append(f"--data.{one.name.replace('_', '-')}")
        if not isinstance(value, bool):
            words += [str(item) for item in value] if isinstance(value, tuple) else [str(value)]
    if bad:
        words += ["--data.on-bad-record", "skip"]
    return shlex.join(words)


def _name(root: str) -> str:
    """The folder's own name, for a file's name."""
    return Path(root).expanduser().resolve().name or "set"
