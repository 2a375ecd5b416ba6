"""Runs a measurement over all images on any number of processes; a stopped one goes on from where it was.

Each process keeps the summary of its images in a file of its own.  Merging is exact (see `moments`), so neither the
number of processes nor stops in between change a bit of the result; another device or number of threads may, as
the heads' own rounding depends on them.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from doublehead.analysis.readers import Reader
from doublehead.config import to_dict
from doublehead.data import DetectionDataset, Loader, Target
from doublehead.engine.distributed import World
from doublehead.engine.errors import UserError
from doublehead.engine.files import write_json
from doublehead.engine.logs import say

SAVE_SECONDS = 30.0
_MERGED = "merged.json"


class Summary(Protocol):
    """What a measurement leaves of any number of images; merging must be exact, in whatever order."""

    def empty(self) -> Summary:
        """One of the same kind that holds nothing."""

    def merge(self, other: Any) -> None:
        """Take in another one."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Summary:
        """Rebuild what `to_dict` gave."""


Measure = Callable[[Tensor, Target], tuple[Any, int]]
"""(image `Tensor[3, H, W]` uint8 on the host, its target) -> (its summary, how many RoIs or objects that were)."""


@dataclass
class State:
    """What has been measured so far."""

    fingerprint: dict[str, Any]
    """What the result depends on; states of different ones have nothing to do with each other."""
    table: Summary
    done: set[int] = field(default_factory=set)
    """Image ids."""

    def add(self, images: Iterable[int], table: Summary) -> None:
        """Take in images that are not done yet."""
        self.table.merge(table)
        self.done.update(images)

    def write(self, path: Path) -> None:
        """Write it as JSON, atomically."""
        content = {"fingerprint": self.fingerprint, "done": sorted(self.done), "table": self.table.to_dict()}
        write_json(path, content, indent=None)


def fingerprint(
    readers: Sequence[Reader], dataset: DetectionDataset, annotations: list[dict[str, Any]], **more: Any
) -> dict[str, Any]:
    """What a measurement depends on, as plain values: the heads, the data with its annotations, and `more`."""
    models = {id(reader.model): _hash_of_model(reader) for reader in readers}
    heads = [[reader.name, models[id(reader.model)], list(reader.sources.classes), reader.sources.boxes]
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
) -> Any:
    """Measure all images that are not done yet, each on one process, and merge everything.

    Args:
        measure: of one image; it must depend on nothing else.
        folder: of the states; made if need be.
        empty: the fingerprint and an empty summary.
        workers: processes that load images, for each process.
        counted: what `measure` counts.

    Returns:
        The summary of all images, on every process.

    Raises:
        UserError: `folder` holds a state of something else, or a damaged one.
        DataError: an image cannot be decoded.
    """
    done = world.on_main(lambda: _merge_states(folder, empty).done)
    todo = [index for index, image_id in enumerate(dataset.image_ids) if image_id not in done]
    if world.is_main and done:
        say(f"{folder}: {len(done)} of {len(dataset)} images are done already")
    begun = time.monotonic()
    count = sum(world.gather(_measure_share(measure, dataset, world, folder, empty, todo, workers, counted)))
    if world.is_main and todo:
        seconds = time.monotonic() - begun
        say(f"{len(todo)} images, {count:,} {counted} in {seconds:.1f} s: {count / seconds:,.0f} {counted}/s")
    return world.on_main(lambda: _merge_states(folder, empty)).table


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
    """This process's share; returns how many RoIs or objects it had."""
    mine = todo[world.rank :: world.size]
    state = State(empty.fingerprint, empty.table.empty())
    path = folder / f"rank-{world.rank}.json"
    loader = Loader(dataset, [[(0, index)] for index in mine], None, workers if mine else 0)
    total, begun = 0, time.monotonic()
    saved = begun
    with tqdm(total=len(mine), unit="image", disable=None if world.is_main else True, dynamic_ncols=True) as bar:
        for (image,), (target,) in loader:
            table, count = measure(image, target)
            state.add([target["image_id"]], table)
            total += count
            now = time.monotonic()
            speed = f"{total / (now - begun):,.0f} {counted}/s"
            bar.set_postfix_str(speed, refresh=False)
            bar.update()
            if now - saved >= SAVE_SECONDS:
                state.write(path)
                saved = now
                if world.is_main and bar.disable:  # not on a terminal: plain lines
                    say(f"{len(state.done)} of {len(mine)} images, {speed}")
    if mine:
        state.write(path)
    return total


def _merge_states(folder: Path, empty: State) -> State:
    """All states in `folder` as one, which then is the only file there."""
    folder.mkdir(parents=True, exist_ok=True)
    merged = State(empty.fingerprint, empty.table.empty())
    files = sorted(folder.glob("rank-*.json"))
    if (folder / _MERGED).exists():
        files.insert(0, folder / _MERGED)
    for file in files:
        state = _read_state(file, empty)
        if state.done <= merged.done:
            continue  # it was merged before, and the process stopped before it was removed
        if state.done & merged.done:
            raise UserError(f"{file}: holds images that another file holds too: remove {folder}, or give another --out")
        merged.add(state.done, state.table)
    if files:
        merged.write(folder / _MERGED)
    for file in files:
        if file.name != _MERGED:
            file.unlink()
    return merged


def _read_state(file: Path, empty: State) -> State:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        before, done = content["fingerprint"], set(content["done"])
        table = type(empty.table).from_dict(content["table"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: damaged: remove {file.parent}, or give another --out") from error
    now = json.loads(json.dumps(empty.fingerprint))
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        names = " and ".join(changed)
        raise UserError(f"{file.parent}: holds the results of other {names}: give another --out, or remove it")
    return State(empty.fingerprint, table, done)


def _hash_of_model(reader: Reader) -> str:
    digest = hashlib.sha256(json.dumps(to_dict(reader.recipe.model)).encode())
    for name, tensor in reader.model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
