"""Detection in many pictures: threads read, the calling thread runs the model, other threads draw.

Only a few pictures are in memory at a time, and results come in the order of the pictures.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from doublehead import data
from doublehead.config import MAX_PIXELS
from doublehead.engine import pictures
from doublehead.engine.evaluator import inference
from doublehead.engine.picture_files import Entry, output_names
from doublehead.engine.streaming import Clock, Uploader, batches, default_threads, in_order
from doublehead.errors import DataError, UserError, one_line


class Picture(NamedTuple):
    """A picture in the pipeline, or why it could not be read."""

    file: Path
    name: str
    """File name of the annotated picture."""
    image: Tensor | None = None
    """`Tensor[3, H, W]` uint8, on the host."""
    copy: Tensor | None = None
    """The image on the model's device, valid once `uploaded` has happened."""
    uploaded: torch.cuda.Event | None = None
    error: str = ""
    output: dict[str, Tensor] | None = None
    """The detections, on the host."""


def detect_in_pictures(
    model: nn.Module,
    files: Sequence[Path],
    folder: Path,
    classes: Sequence[str],
    on_entry: Callable[[Entry], None],
    *,
    score_threshold: float = 0.5,
    batch_size: int = 1,
    dtype: torch.dtype | None = None,
    threads: int = 0,
    max_pixels: int = MAX_PIXELS,
    clock: Clock | None = None,
    too_large: Callable[[int, int], str | None] | None = None,
) -> None:
    """Detect in each picture, and save it annotated.

    Args:
        model: a detector, on the device to use.
        files: the pictures.
        folder: an existing folder for the annotated pictures.
        classes: their names; label i is `classes[i - 1]`.
        on_entry: called with each picture's entry in `detections.json`, in order; that of a picture which could not be
            read has an `error`.
        score_threshold: leave out detections that score below this.
        batch_size: pictures that go through the model at once.
        dtype: float16 or bfloat16 for autocast; None: compute in the model's own.
        threads: threads that read, and as many that draw; 0: `default_threads()`.
        max_pixels: larger pictures are not read.
        clock: sums up the time of each stage.
        too_large: why the model cannot take a picture of this (height, width), which counts as unreadable then; None:
            it takes any size.

    If it is stopped or fails, no picture stays that was not reported.

    Raises:
        UserError: the GPU's memory does not suffice for a batch.
    """
    Image.init()  # once, before many threads would do it at the same time
    clock = clock or Clock()
    uploader = Uploader(next(model.parameters()).device)
    threads = threads or default_threads()
    named = zip(files, output_names(files, folder), strict=True)
    unreported: set[Path] = set()
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [path.unlink(missing_ok=True) for path in unreported])  # when the threads have ended
        stack.enter_context(inference(model))
        read = in_order(
            lambda item: _read(*item, uploader, clock, max_pixels, too_large),
            named,
            threads,
            ahead=threads + 2 * batch_size,
        )
        stack.enter_context(contextlib.closing(read))
        detected = (
            picture
            for batch in batches(read, batch_size)
            for picture in _detect(model, batch, uploader, score_threshold, dtype, clock)
        )
        drawn = in_order(
            lambda picture: _draw(picture, folder, classes, clock, unreported),
            detected,
            threads,
            ahead=threads + batch_size,
        )
        stack.enter_context(contextlib.closing(drawn))
        for entry in tqdm(drawn, total=len(files), desc="detecting", unit="picture", disable=None):
            on_entry(entry)
            unreported.discard(folder / entry.get("picture", ""))


def _read(
    file: Path,
    name: str,
    uploader: Uploader,
    clock: Clock,
    max_pixels: int,
    too_large: Callable[[int, int], str | None] | None,
) -> Picture:
    with clock.measure("reading"):
        try:
            image = data.read_image(file, upright=True, max_pixels=max_pixels)
        except DataError as error:  # the picture is reported, the others are done
            return Picture(file, name, error=str(error).removeprefix(one_line(f"{file}: ")))
        if too_large and (problem := too_large(*image.shape[-2:])):
            return Picture(file, name, error=f"a picture {problem}")
        return Picture(file, name, *uploader.send(image))


def _detect(
    model: nn.Module,
    batch: Sequence[Picture],
    uploader: Uploader,
    score_threshold: float,
    dtype: torch.dtype | None,
    clock: Clock,
) -> list[Picture]:
    """The pictures with their detections; unreadable ones unchanged."""
    readable = [picture for picture in batch if not picture.error]
    with clock.measure("model"), torch.autocast(uploader.device.type, dtype, enabled=dtype is not None):
        images = [uploader.receive(picture.copy, picture.uploaded) for picture in readable]
        try:
            outputs = model(images) if images else []
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the GPU's memory does not suffice for {len(images)} pictures at once, up to {readable[-1].file}: "
                "give a smaller --batch-size, --precision bf16 or --device cpu"
            ) from error
        detected = {}
        for picture, output in zip(readable, outputs, strict=True):
            output = {name: values.cpu() for name, values in output.items()}
            keep = output["scores"] >= score_threshold
            detected[picture.file] = picture._replace(
                copy=None, output={name: values[keep] for name, values in output.items()}
            )
    return [detected.get(picture.file, picture) for picture in batch]


def _draw(picture: Picture, folder: Path, classes: Sequence[str], clock: Clock, saved: set[Path]) -> Entry:
    """Draw and save a picture, whose path goes into `saved`; returns its entry in the JSON."""
    if picture.error:
        return {"file": str(picture.file), "error": picture.error}
    with clock.measure("drawing"):
        output = picture.output
        image = pictures.to_picture(picture.image)
        drawn = pictures.draw_boxes(image, output["boxes"], output["labels"], classes, output["scores"])
        pictures.save_picture(folder / picture.name, drawn)
        saved.add(folder / picture.name)
        return {
            "file": str(picture.file), "picture": picture.name, "width": drawn.width, "height": drawn.height,
            "detections": _as_json(output, classes),
        }  # fmt: skip


def _as_json(output: dict[str, Tensor], classes: Sequence[str]) -> list[Entry]:
    columns = (output[name].tolist() for name in ("labels", "scores", "boxes"))
    return [
        {"class": classes[label - 1], "label": label, "score": score, "box": box}
        for label, score, box in zip(*columns, strict=True)
    ]
