"""Runs a measurement over all images on any number of processes; an interrupted one can be continued.

Each process saves the summary of its images in its own file.  Merging is exact (see `moments`), so the result is the
same to the bit for any number of processes and interruptions.  Another device or number of threads may change it,
because the heads' rounding depends on them.

Ctrl-C and SIGTERM finish the current image and save the state.  A lock admits one command at a time to a folder.  Saved
states are JSON with a digest, and fully validated when they are read (see `states`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from doublehead.analysis.readers import Reader, digest_of
from doublehead.analysis.states import State, merge_states
from doublehead.config import to_dict
from doublehead.data import DetectionDataset, Loader, Target
from doublehead.engine.distributed import World
from doublehead.engine.lock import FolderLock
from doublehead.engine.logs import say
from doublehead.engine.signals import Stopped, StopSignals
from doublehead.errors import UserError

SAVE_SECONDS = 30.0

Measure = Callable[[Tensor, Target], tuple[Any, int]]
"""(image `Tensor[3, H, W]` uint8 on the CPU, its target) -> (its summary, its number of RoIs or objects)."""


def fingerprint(
    readers: Sequence[Reader], dataset: DetectionDataset, annotations: list[dict[str, Any]], **more: Any
) -> dict[str, Any]:
    """Everything a measurement depends on, as plain values: the heads, the data with its annotations, and `more`."""
    models = {
        id(reader.model): digest_of(to_dict(reader.recipe.model), reader.model.state_dict()) for reader in readers
    }
    heads = [[reader.name, models[id(reader.model)], list(reader.readout.sources.classes), reader.readout.sources.boxes]
             for reader in readers]  # fmt: skip
    data = [dataset.name, dataset.image_ids, dataset.image_sizes, annotations]
    return {"heads": heads, "data": hashlib.sha256(json.dumps(data).encode()).hexdigest(), **more}


def measure_images(
    measure: Measure,
    dataset: DetectionDataset,
    world: World,
    folder: Path,
    empty: State,
    workers: int = 0,
    counted: str = "RoIs",
    image_ids: Sequence[int] | None = None,
) -> Any:
    """Measure all remaining images, each on one process, and merge the summaries.

    Args:
        measure: measures one image; its result must depend on nothing else.
        folder: the folder of the states; created if it does not exist.
        empty: the fingerprint and an empty summary.
        workers: the number of image-loading workers per process.
        counted: what `measure` counts, for messages.
        image_ids: the images to measure; None: all of `dataset`.

    Returns:
        The summary of all images, on every process.

    Raises:
        UserError: `folder` holds a state of another measurement or a damaged one, or is in use.
        Stopped: after Ctrl-C or SIGTERM; the measured images are kept.
        DataError: an image cannot be decoded.
    """
    wanted = dataset.image_ids if image_ids is None else image_ids
    with _alone(folder, world):
        done = world.on_main(lambda: merge_states(folder, empty, wanted).done)
        left = set(wanted) - done
        todo = [index for index, image_id in enumerate(dataset.image_ids) if image_id in left]
        if world.is_main and done:
            say(f"{folder}: {len(done)} of {len(wanted)} images are done already")
        begun = time.monotonic()
        count = sum(world.gather(_measure_share(measure, dataset, world, folder, empty, todo, workers, counted)))
        if world.is_main and todo:
            seconds = time.monotonic() - begun
            say(f"{len(todo)} images, {count:,} {counted} in {seconds:.1f} s: {count / seconds:,.0f} {counted}/s")
        return world.on_main(lambda: merge_states(folder, empty, wanted)).table


@contextlib.contextmanager
def _alone(folder: Path, world: World) -> Iterator[None]:
    """Hold the lock on `folder`.

    Raises:
        UserError: another command holds it.
    """
    lock = FolderLock(folder)
    world.on_main(lambda: _acquire(lock))
    try:
        yield
    finally:
        if world.is_main:
            lock.release()


def _acquire(lock: FolderLock) -> None:
    try:
        lock.acquire()
    except UserError as error:
        if "in use" not in str(error):
            raise
        raise UserError(
            f"{lock.folder}: another analysis is running there: wait until it ends or stop it, or give another --out"
        ) from error


def _measure_share(
    measure: Measure,
    dataset: DetectionDataset,
    world: World,
    folder: Path,
    empty: State,
    todo: list[int],
    workers: int,
    counted: str,
) -> int:
    """Measure this process's share of the images; returns its number of RoIs or objects."""
    mine = todo[world.rank :: world.size]
    state = State(empty.fingerprint, empty.table.empty())
    path = folder / f"rank-{world.rank}.json"
    loader = Loader(dataset, [[(0, index)] for index in mine], None, workers if mine else 0)
    total, begun = 0, time.monotonic()
    saved = begun
    with (
        StopSignals() as stop,
        tqdm(total=len(mine), unit="image", disable=None if world.is_main else True, dynamic_ncols=True) as bar,
    ):
        for (image,), (target,) in loader:
            table, count = measure(image, target)
            state.add([target["image_id"]], table)
            total += count
            now = time.monotonic()
            speed = f"{total / (now - begun):,.0f} {counted}/s"
            bar.set_postfix_str(speed, refresh=False)
            bar.update()
            if stop.received:
                break
            if now - saved >= SAVE_SECONDS:
                state.write(path)
                saved = now
                if world.is_main and bar.disable:  # no terminal: plain lines
                    say(f"{len(state.done)} of {len(mine)} images, {speed}")
        if mine:
            state.write(path)
    if stop.received:
        if world.is_main:
            whose = "" if world.size == 1 else " of this process"
            kept = f"{len(state.done)} of the {len(mine)} images{whose} that were left are kept"
            say(f"stopped: {kept} in {folder}; the same command continues from there")
        raise Stopped(stop.received)
    return total
