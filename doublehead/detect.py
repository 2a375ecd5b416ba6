"""`python -m doublehead.detect CHECKPOINT IMAGE... --out DIR`: draw what a detector finds in pictures."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import tyro

from doublehead.engine.logs import counted_warnings
from doublehead.engine.picture_files import (
    HOW_TO_SPLIT,
    JSON_FILE,
    VIDEOS,
    Entry,
    find_pictures,
    output_names,
    write_results,
)
from doublehead.errors import UserError, one_line, shown_to_user

if TYPE_CHECKING:
    import torch

    from doublehead.engine.streaming import Clock, Uploader

PROGRAM = "python -m doublehead.detect"
MAX_PIXELS, MOST_PIXELS = 100_000_000, 178_956_970  # as of `data.images`, which --help need not wait for


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
    batch_size: int = 1
    """Pictures that go through the model at once.  They are padded to a common size, which changes detections slightly
    where sizes differ: with 1 a picture's detections do not depend on its neighbours."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """Compute in 16 bits: faster on GPUs, slightly other scores."""
    threads: int = 0
    """Threads that read pictures, and as many that draw; 0: half of the processors, at most 8."""
    max_pixels: int = MAX_PIXELS
    """Larger pictures are not read; at most 178,956,970, where Pillow refuses in any case."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line.

    Exits with 1 when a picture could not be read, 2 on another user's error, 130 on Ctrl-C, 143 on SIGTERM.
    """
    with shown_to_user(), counted_warnings(), _sigterm_as_interrupt() as received:
        options = tyro.cli(Options, prog=PROGRAM, description="Draw what a detector finds in pictures.", args=arguments)
        try:
            unreadable = run(options)
        except KeyboardInterrupt as stop:
            what = stop.args[0] if stop.args else "no picture is done"
            print(f"stopped: {what}; the same command begins anew", file=sys.stderr)
            raise SystemExit(128 + (received[0] if received else signal.SIGINT)) from None
    if unreadable:
        print(f"{len(unreadable)} could not be read:", file=sys.stderr)
        for entry in unreadable:
            file = one_line(entry["file"]) or "''"
            print(f"  {file}: {one_line(entry['error'])}", file=sys.stderr)
        raise SystemExit(1)


def run(options: Options) -> list[Entry]:
    """Detect in all pictures, write `detections.json`, and return the unreadable ones (`file`, `error`).

    The JSON holds `classes`; `pictures`, each with `file`, `picture` (the annotated one, scaled down where a JPEG could
    not hold it), `width`, `height` and `detections` (`class`, `label`, `score`, `box` x1, y1, x2, y2 in pixels of the
    picture as it is looked at, that is, turned as its EXIF note says); and `unreadable`.

    Stopped by Ctrl-C it writes what is done so far.  Annotated pictures that an earlier call left in the folder, and
    that its JSON lists, are removed when this one's JSON takes its place; other files stay.

    Raises:
        UserError: no picture is named, or an option, the folder, the checkpoint or the device cannot be used, or the
            GPU's memory does not suffice.
    """
    from doublehead.data.jpeg import is_strict  # these bring PyTorch: --help need not wait for it
    from doublehead.engine.checkpoint import load_model
    from doublehead.engine.distributed import join_world
    from doublehead.engine.streaming import Clock

    _check(options)
    files, unreadable = find_pictures(options.images, leave_out=Path(options.out))
    if not is_strict():
        print("note: simplejpeg is not installed: a JPEG that is damaged inside is not noticed", file=sys.stderr)
    entries: list[Entry] = []
    clock = Clock()
    with join_world(options.device) as world:
        if world.size > 1:
            raise UserError("detection runs on one process: leave torchrun out")
        model, _, classes, _ = load_model(options.checkpoint)
        model = model.to(world.device)
        folder = _made(Path(options.out))
        start = time.perf_counter()
        try:
            _detect_all(model, files, folder, classes, options, clock, entries, unreadable)
        except KeyboardInterrupt:
            if not entries:
                raise
            write_results(folder, classes, entries, unreadable, files)
            done = f"{len(entries)} of {len(files)} pictures are done and in {folder / JSON_FILE}"
            raise KeyboardInterrupt(done) from None
        seconds = time.perf_counter() - start
    write_results(folder, classes, entries, unreadable, files)
    print(f"{len(entries)} pictures with {sum(len(e['detections']) for e in entries)} detections in {folder}")
    stages = ", ".join(f"{stage} {spent:.1f} s" for stage, spent in clock.seconds.items())
    print(f"{seconds:.1f} s, {len(entries) / seconds:.2f} pictures/s; at the same time: {stages}")
    return unreadable


def _check(options: Options) -> None:
    if not options.images:
        raise UserError("no picture is named: give files, folders or quoted patterns after the checkpoint")
    if not 0 <= options.score_threshold <= 1:
        raise UserError(f"--score-threshold is {options.score_threshold}, a number from 0 to 1 is accepted")
    if options.batch_size < 1:
        raise UserError(f"--batch-size is {options.batch_size}, at least 1 is accepted")
    if not 1 <= options.max_pixels <= MOST_PIXELS:
        raise UserError(f"--max-pixels is {options.max_pixels}, 1 .. {MOST_PIXELS} is accepted")
    results = os.path.join(options.out, JSON_FILE)
    if os.path.exists(results) and not os.path.isfile(results):
        raise UserError(f"{results}: is no file, and the results cannot take its place: give another --out")
    if options.threads < 0:
        raise UserError(f"--threads is {options.threads}, 0 (half of the processors) or more is accepted")


class Picture(NamedTuple):
    """A picture on its way, or why there is none."""

    file: Path
    name: str
    """Of the annotated picture."""
    image: torch.Tensor | None = None
    """`Tensor[3, H, W]` uint8, on the host."""
    copy: torch.Tensor | None = None
    """On the model's device, as soon as `there`."""
    there: torch.cuda.Event | None = None
    error: str = ""
    output: dict[str, torch.Tensor] | None = None
    """What was found, on the host."""


def _detect_all(
    model: torch.nn.Module,
    files: Sequence[Path],
    folder: Path,
    classes: list[str],
    options: Options,
    clock: Clock,
    done: list[Entry],
    unreadable: list[Entry],
) -> None:
    """Add each picture's entry to `done` or `unreadable`, in order.

    Threads read, this one runs the model, other threads draw; only a few pictures are under way at a time.
    """
    from PIL import Image
    from tqdm import tqdm

    from doublehead.engine.evaluator import inference
    from doublehead.engine.streaming import Uploader, batches, default_threads, in_order

    Image.init()  # once, before many threads would do it at the same time
    uploader = Uploader(next(model.parameters()).device)
    threads = options.threads or default_threads()
    names = zip(files, output_names(files, folder), strict=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(inference(model))
        ahead = threads + 2 * options.batch_size
        read = in_order(lambda item: _read(*item, uploader, clock, options.max_pixels), names, threads, ahead)
        stack.enter_context(contextlib.closing(read))
        found = (
            picture
            for batch in batches(read, options.batch_size)
            for picture in _found(model, batch, uploader, options, clock)
        )
        drawn = in_order(
            lambda item: _drawn(item, folder, classes, clock), found, threads, threads + options.batch_size
        )
        stack.enter_context(contextlib.closing(drawn))
        for entry in tqdm(drawn, total=len(files), desc="detecting", unit="picture", disable=None):
            (unreadable if "error" in entry else done).append(entry)


def _read(file: Path, name: str, uploader: Uploader, clock: Clock, max_pixels: int) -> Picture:
    from doublehead.data import DataError, read_image

    if file.suffix.lower() in VIDEOS:
        return Picture(file, name, error=f"a video: {HOW_TO_SPLIT}")
    with clock.measure("reading"):
        try:
            image = read_image(file, upright=True, max_pixels=max_pixels)
        except DataError as error:  # the picture is reported, the others are done
            return Picture(file, name, error=str(error).removeprefix(one_line(f"{file}: ")))
        return Picture(file, name, *uploader.send(image))


def _found(
    model: torch.nn.Module, batch: Sequence[Picture], uploader: Uploader, options: Options, clock: Clock
) -> list[Picture]:
    """The pictures with what the model finds in them; those that could not be read as they are."""
    import torch

    dtype = torch.float16 if options.amp == "fp16" else torch.bfloat16
    readable = [picture for picture in batch if not picture.error]
    with clock.measure("model"), torch.autocast(uploader.device.type, dtype, enabled=options.amp != "off"):
        images = [uploader.receive(picture.copy, picture.there) for picture in readable]
        try:
            outputs = model(images) if images else []
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the GPU's memory does not suffice for {len(images)} pictures at once, up to {readable[-1].file}: "
                "give a smaller --batch-size, --amp bf16 or --device cpu"
            ) from error
        found = {}
        for picture, output in zip(readable, outputs, strict=True):
            output = {name: values.cpu() for name, values in output.items()}
            keep = output["scores"] >= options.score_threshold
            found[picture.file] = picture._replace(
                copy=None, output={name: values[keep] for name, values in output.items()}
            )
    return [found.get(picture.file, picture) for picture in batch]


def _drawn(picture: Picture, folder: Path, classes: list[str], clock: Clock) -> Entry:
    """Draw and save a picture; its entry in the JSON."""
    from doublehead.engine.pictures import draw_boxes, save_picture, to_picture

    if picture.error:
        return {"file": str(picture.file), "error": picture.error}
    with clock.measure("drawing"):
        output = picture.output
        drawn = draw_boxes(to_picture(picture.image), output["boxes"], output["labels"], classes, output["scores"])
        save_picture(folder / picture.name, drawn)
        return {
            "file": str(picture.file), "picture": picture.name, "width": drawn.width, "height": drawn.height,
            "detections": _as_json(output, classes),
        }  # fmt: skip


def _as_json(output: dict[str, torch.Tensor], classes: list[str]) -> list[Entry]:
    columns = (output[name].tolist() for name in ("labels", "scores", "boxes"))
    return [
        {"class": classes[label - 1], "label": label, "score": score, "box": box}
        for label, score, box in zip(*columns, strict=True)
    ]


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[list[int]]:
    """Inside, SIGTERM ends the work as Ctrl-C does; yields the signal's number once it came."""
    received: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # Python allows no handlers elsewhere
        yield received
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be made: {error.strerror}") from error
    return folder


if __name__ == "__main__":
    main()
