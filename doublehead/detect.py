"""`python -m doublehead.detect CHECKPOINT IMAGE... --out DIR`: draw what a detector finds in pictures."""

from __future__ import annotations

import glob
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from doublehead.engine.errors import UserError, shown_to_user

if TYPE_CHECKING:
    import torch
    from PIL import Image

PROGRAM = "python -m doublehead.detect"
ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
JSON_FILE = "detections.json"
Entry = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What the command line takes."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A model.safetensors, or the folder of a run."""
    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE...")]
    """Pictures, folders of pictures (searched to the bottom), or quoted patterns such as 'photos/*.jpg'."""
    out: str
    """Folder for the annotated pictures and detections.json."""
    score_threshold: float = 0.5
    """Leave out detections that score below this."""
    device: str = "auto"
    """`auto`: CUDA where there is one, else CPU."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; exits with 1 when a picture could not be read, with 2 on another user's error."""
    with shown_to_user():
        options = tyro.cli(Options, prog=PROGRAM, description="Draw what a detector finds in pictures.", args=arguments)
        unreadable = run(options)
    if unreadable:
        print(f"{len(unreadable)} could not be read:", file=sys.stderr)
        for entry in unreadable:
            print(f"  {entry['file']}: {entry['error']}", file=sys.stderr)
        raise SystemExit(1)


def run(options: Options) -> list[Entry]:
    """Detect in all pictures, write `detections.json`, and return the unreadable ones (`file`, `error`).

    The JSON holds `classes`; `pictures`, each with `file`, `picture` (the annotated one), `width`,
    `height` and `detections` (`class`, `label`, `score`, `box` x1, y1, x2, y2 in pixels of the picture as it is
    looked at, that is, turned as its EXIF note says); and `unreadable`.

    Raises:
        UserError: no picture is named, or the threshold, the folder, the checkpoint or the device cannot be used.
    """
    from doublehead.engine.checkpoint import load_model  # these bring PyTorch: --help need not wait for it
    from doublehead.engine.distributed import join_world
    from doublehead.engine.files import write_json

    if not options.images:
        raise UserError("no picture is named: give files, folders or quoted patterns after the checkpoint")
    if not 0 <= options.score_threshold <= 1:
        raise UserError(f"--score-threshold is {options.score_threshold}, a number from 0 to 1 is accepted")
    folder = _made(Path(options.out))
    files, unreadable = find_pictures(options.images, leave_out=folder)
    with join_world(options.device) as world:
        if world.size > 1:
            raise UserError("detection runs on one process: leave torchrun out")
        model, _, classes, _ = load_model(options.checkpoint)
        model = model.to(world.device)
        entries, broken = _detect_all(model, files, folder, classes, options.score_threshold)
    unreadable += broken
    write_json(folder / JSON_FILE, {"classes": classes, "pictures": entries, "unreadable": unreadable})
    print(f"{len(entries)} pictures with {sum(len(e['detections']) for e in entries)} detections in {folder}")
    return unreadable


def find_pictures(names: Sequence[str], leave_out: Path) -> tuple[list[Path], list[Entry]]:
    """Expand files, folders and patterns, each picture once, in order; and the names that match nothing.

    Args:
        leave_out: pictures found in this folder are those of an earlier call, not input.
    """
    files: dict[Path, Path] = {}
    unmatched = []
    for name in names:
        path = Path(name)
        if path.is_file():
            found = [path]
        elif path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
            found = [p for p in found if leave_out.resolve() not in p.resolve().parents]
        else:
            found = sorted(Path(p) for p in glob.glob(name, recursive=True) if Path(p).is_file())
        if not found:
            unmatched.append({"file": name, "error": "no picture in this folder" if path.is_dir() else "no such file"})
        files.update({p.resolve(): p for p in found if p.resolve() not in files})
    return list(files.values()), unmatched


def output_names(files: Sequence[Path], folder: Path) -> list[str]:
    """A name in `folder` for each picture: its own with the ending .jpg, numbered where two would be the same.

    No name is that of an input in `folder`: the originals are never overwritten.
    """
    taken = {path.name.lower() for path in files if path.resolve().parent == folder.resolve()}
    names = []
    for path in files:
        name, number = f"{path.stem}.jpg", 2
        while name.lower() in taken:  # some file systems do not tell A.jpg from a.jpg
            name, number = f"{path.stem}-{number}.jpg", number + 1
        taken.add(name.lower())
        names.append(name)
    return names


def read_picture(path: Path) -> Image.Image:
    """Read a picture as RGB, turned upright as its EXIF note says.

    Raises:
        Exception: whatever the decoder makes of a broken file.
    """
    from PIL import Image, ImageOps

    with Image.open(path) as picture:
        return ImageOps.exif_transpose(picture).convert("RGB")


def _detect_all(
    model: torch.nn.Module, files: Sequence[Path], folder: Path, classes: list[str], threshold: float
) -> tuple[list[Entry], list[Entry]]:
    """Entries of the pictures done and of those that could not be read."""
    from tqdm import tqdm

    from doublehead.engine.evaluator import predict_images
    from doublehead.engine.pictures import draw_boxes, from_picture, save_picture

    device = next(model.parameters()).device
    done, broken = [], []
    bar = tqdm(files, desc="detecting", unit="picture", disable=None)
    for path, name in zip(bar, output_names(files, folder), strict=True):
        try:
            picture = read_picture(path)
        except Exception as error:  # decoders raise many kinds: the picture is reported, the others are done
            broken.append({"file": str(path), "error": str(error).strip() or type(error).__name__})
            continue
        (output,) = predict_images(model, [from_picture(picture)], device)
        output = {key: value[output["scores"] >= threshold] for key, value in output.items()}
        drawn = draw_boxes(picture, output["boxes"], output["labels"], classes, output["scores"])
        save_picture(folder / name, drawn)
        done.append(
            {"file": str(path), "picture": name, "width": picture.width, "height": picture.height}
            | {"detections": _as_json(output, classes)}
        )
    return done, broken


def _as_json(output: dict[str, torch.Tensor], classes: list[str]) -> list[Entry]:
    columns = (output[name].tolist() for name in ("labels", "scores", "boxes"))
    return [
        {"class": classes[label - 1], "label": label, "score": score, "box": box}
        for label, score, box in zip(*columns, strict=True)
    ]


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be made: {error.strerror}") from error
    return folder


if __name__ == "__main__":
    main()
