"""`doublehead detect CHECKPOINT IMAGE... --out DIR`: draw what a detector finds in pictures."""

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
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from doublehead.cli.readouts import ExtGate
from doublehead.cli.runtimes import Program, Runtime, is_exported, open_exported, open_in_openvino, open_model
from doublehead.config import MAX_PIXELS, MOST_PIXELS, Precision
from doublehead.engine.logs import counted_warnings
from doublehead.engine.picture_files import JSON_FILE, Entry, check_free, find_pictures, write_results
from doublehead.errors import UserError, one_line, shown_to_user

if TYPE_CHECKING:
    import torch

PROGRAM = "doublehead detect"


@dataclass(frozen=True)
class Options:
    """What the command line takes."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A model.safetensors, the folder of a run, or a file that `doublehead export` wrote."""
    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE...")]
    """Pictures, folders of pictures (searched to the bottom), or quoted patterns such as 'photos/*.jpg'."""
    out: str
    """Folder for the annotated pictures and detections.json; one that holds another call's results is refused."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace the results that an earlier call left in --out; no other file there is touched."""
    score_threshold: float = 0.5
    """Leave out detections that score below this, 0 .. 1."""
    device: str = "auto"
    """`auto`: CUDA where there is one, else CPU."""
    runtime: Runtime | None = None
    """`torch`: by default for a checkpoint; an exported file has a runtime of its own.  `openvino`: translate the
    checkpoint to OpenVINO first, which takes about a minute for each size of pictures, and run it on the CPU;
    `doublehead export RUN model.xml` does so once."""
    batch_size: int = 1
    """Pictures that go through the model at once.  They are padded to a common size, which changes detections slightly
    where sizes differ: with 1 a picture's detections do not depend on its neighbours."""
    precision: Precision | None = None
    """`fp32` (by default), `bf16` or `fp16`: faster on GPUs and on CPUs that have it, slightly other scores; `int8`:
    the layers of the heads that `doublehead quantize` found fit for it, on a CPU."""
    amp: Literal["off", "bf16", "fp16"] | None = None
    """The former name of --precision."""
    ext_gate: ExtGate | None = None
    """Leave out RoIs whose best fc-score is not above this, which is faster and approximate (Ext models, read-out
    `fused`); `calibrated`: the gate that `doublehead calibrate` stored beside the weights."""
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
            what = stop.args[0] if stop.args else "no picture is done; the same command starts over"
            print(f"stopped by {'SIGTERM' if received else 'Ctrl-C'}: {what}", file=sys.stderr)
            raise SystemExit(128 + (received[0] if received else signal.SIGINT)) from None
    if unreadable:
        print(f"{len(unreadable)} could not be read:", file=sys.stderr)
        for entry in unreadable:
            file = one_line(entry["file"]) or "''"
            print(f"  {file}: {one_line(entry['error'])}", file=sys.stderr)
        raise SystemExit(1)


def run(options: Options) -> list[Entry]:
    """Detect in all pictures, write `detections.json`, and return the unreadable ones (`file`, `error`).

    The JSON holds `checkpoint` and `score_threshold` as given; `classes`; `pictures`, each with `file`, `picture` (the
    annotated one, scaled down where a JPEG could not hold it), `width`, `height` and `detections` (`class`, `label`,
    `score`, `box` x1, y1, x2, y2 in pixels of the picture as it is looked at, that is, turned as its EXIF note says);
    `unreadable`; and `not_done`, the files that were left when the call was stopped.

    Stopped by Ctrl-C or an error it writes what is done so far.  If no picture could be read nothing is written.
    Annotated pictures that an earlier call left in the folder, and that its JSON lists, are removed when this one's
    JSON takes its place (`--overwrite`); other files stay.

    Raises:
        UserError: no picture is named, or an option, the folder, the checkpoint or the device cannot be used, or the
            GPU's memory does not suffice.
    """
    _check(options)
    folder = Path(options.out)
    found = find_pictures(options.images, leave_out=folder)
    for note in found.notes:
        print(f"note: {one_line(note)}", file=sys.stderr)
    entries: list[Entry] = []
    unreadable = list(found.unreadable)
    if found.files:
        with _made(folder):
            _detect(options, found.files, entries, unreadable)
    if not entries:
        kept = f": the results of an earlier call stay in {folder}" if (folder / JSON_FILE).is_file() else ""
        print(f"no picture was read, nothing is written{kept}")
    return unreadable


def _detect(options: Options, files: Sequence[Path], entries: list[Entry], unreadable: list[Entry]) -> None:
    """Detect in `files`, and add to the two lists; the JSON is written if there is an entry."""
    from doublehead.data.jpeg import is_strict  # only now: these take seconds to import
    from doublehead.engine.detecting import detect_in_pictures
    from doublehead.engine.distributed import join_world
    from doublehead.engine.streaming import Clock

    if not is_strict():
        print("note: simplejpeg is not installed: a JPEG that is damaged inside is not noticed", file=sys.stderr)
    clock, folder = Clock(), Path(options.out)
    with join_world(options.device) as world:
        if world.size > 1:
            raise UserError("detection runs on one process: leave torchrun out")
        program = _program(options, world.device)
        classes = program.classes
        start = time.perf_counter()

        def write() -> None:
            done = {entry["file"] for entry in (*entries, *unreadable)}
            results = {
                "checkpoint": options.checkpoint, "score_threshold": options.score_threshold, "classes": classes,
                "pictures": entries, "unreadable": unreadable,
                "not_done": [str(file) for file in files if str(file) not in done],
            }  # fmt: skip
            write_results(folder, results, files)

        try:
            detect_in_pictures(
                program.model,
                files,
                folder,
                classes,
                on_entry=lambda entry: (unreadable if "error" in entry else entries).append(entry),
                score_threshold=options.score_threshold,
                batch_size=options.batch_size,
                dtype=program.dtype,
                threads=options.threads,
                max_pixels=options.max_pixels,
                clock=clock,
                too_large=program.too_large,
            )
        except BaseException as error:
            if not entries:
                raise
            done = f"{len(entries)} of {len(files)} pictures are done and in {folder / JSON_FILE}"
            if isinstance(error, KeyboardInterrupt):
                write()
                raise KeyboardInterrupt(f"{done}; to start over, add --overwrite") from None
            with contextlib.suppress(OSError):  # a full disk, say: the first error is the one to show
                write()
                print(f"stopped by an error: {done}", file=sys.stderr)
            raise
        seconds = time.perf_counter() - start
    if not entries:
        return
    write()
    print(f"{len(entries)} pictures with {sum(len(e['detections']) for e in entries)} detections in {folder}")
    stages = ", ".join(f"{stage} {spent:.1f} s" for stage, spent in clock.seconds.items())
    print(f"{seconds:.1f} s, {len(entries) / seconds:.2f} pictures/s; at the same time: {stages}")


def asked_precision(options: Options) -> Precision | None:
    """What --precision or its former name asks for; None: nothing.

    Raises:
        UserError: they contradict each other.
    """
    former: Precision | None = "fp32" if options.amp == "off" else options.amp
    if options.precision and former and options.precision != former:
        raise UserError(f"--precision {options.precision} and --amp {options.amp} contradict each other: leave one out")
    return options.precision or former


def _program(options: Options, device: torch.device) -> Program:
    """What runs on the pictures: an exported program, the checkpoint in OpenVINO, or the model itself."""
    precision = asked_precision(options)
    if is_exported(options.checkpoint):
        if options.ext_gate is not None:
            raise UserError(f"--ext-gate: {options.checkpoint} has the gate it was exported with: give it to export")
        return open_exported(options.checkpoint, options.device, precision, options.batch_size)
    if options.runtime == "openvino":
        return open_in_openvino(options.checkpoint, options.device, precision, options.ext_gate)
    return open_model(options.checkpoint, device, precision, options.ext_gate)


def _check(options: Options) -> None:
    asked_precision(options)
    own = {".xml": "openvino", ".onnx": None}.get(Path(options.checkpoint).suffix.lower(), "torch")
    if options.runtime not in (None, own) and is_exported(options.checkpoint):
        raise UserError(
            f"--runtime {options.runtime}: {options.checkpoint} is exported for another runtime: leave --runtime out"
        )
    if not options.images:
        raise UserError("no picture is named: give files, folders or quoted patterns after the checkpoint")
    if not 0 <= options.score_threshold <= 1:
        raise UserError(f"--score-threshold is {options.score_threshold}, a number from 0 to 1 is accepted")
    if options.batch_size < 1:
        raise UserError(f"--batch-size is {options.batch_size}, at least 1 is accepted")
    if not 1 <= options.max_pixels <= MOST_PIXELS:
        raise UserError(f"--max-pixels is {options.max_pixels}, 1 .. {MOST_PIXELS} is accepted")
    if options.threads < 0:
        raise UserError(f"--threads is {options.threads}, 0 (half of the processors) or more is accepted")
    check_free(Path(options.out), options.overwrite)


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


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Inside, the folder exists; if nothing is in it at the end, it is removed unless it was there before."""
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--out {folder}: is not writable")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # it is not empty
            for path in missing:
                path.rmdir()
