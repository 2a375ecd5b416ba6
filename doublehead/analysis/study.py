"""The common setup of the statistics over objects (Figures 2, 3 and 7): readers, images, groups and states."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from doublehead.analysis import windows
from doublehead.analysis.groups import Group, describe, find_groups, object_sizes
from doublehead.analysis.jackknife import CLUSTERS
from doublehead.analysis.moments import MomentTable
from doublehead.analysis.options import Pearson, SlidingWindows
from doublehead.analysis.output import output_folder
from doublehead.analysis.readers import Reader, open_readers
from doublehead.analysis.shards import fingerprint, measure_images
from doublehead.analysis.states import State
from doublehead.data import DetectionDataset, Target, build_dataset
from doublehead.engine.data_options import data_config
from doublehead.engine.distributed import World
from doublehead.engine.logs import say
from doublehead.errors import UserError, config_errors


@dataclass
class Study:
    """The setup of a measurement."""

    figure: str
    """The figure's name, on the command line and in file names."""
    readers: list[Reader]
    dataset: DetectionDataset
    workers: int
    groups: list[Group]
    sizes: dict[int, Tensor]
    """Id of each image to measure -> size of each of its objects, see `object_sizes`."""
    folder: Path
    fingerprint: dict[str, Any]
    seconds: float = 0.0
    """How long `measure` took."""

    @property
    def heads(self) -> dict[str, list[int]]:
        """Name of each head -> the indices of its readers, one for each seed."""
        found: dict[str, list[int]] = {}
        for number, reader in enumerate(self.readers):
            found.setdefault(reader.name, []).append(number)
        return found

    @property
    def objects(self) -> int:
        """The number of objects of the images to measure."""
        return sum(map(len, self.sizes.values()))

    def cluster(self, image_id: int) -> int:
        """The group of pictures that an image belongs to (see `jackknife`), by its position in the data."""
        return self._positions[image_id] % CLUSTERS

    @functools.cached_property
    def _positions(self) -> dict[int, int]:
        return {image_id: position for position, image_id in enumerate(self.dataset.image_ids)}

    def pairs_of_heads(self) -> Iterator[tuple[str, str, list[tuple[int, int]]]]:
        """(head, the head before it to compare with, their readers' indices seed by seed), for every two heads."""
        for (minus, others), (head, own) in itertools.combinations(self.heads.items(), 2):
            if len(own) == len(others):
                yield head, minus, list(zip(own, others, strict=True))

    def measure(
        self, measure_image: MeasureImage, options: SlidingWindows | Pearson, shape: Sequence[int], world: World
    ) -> MomentTable:
        """The merged results of `measure_image` for all images (see `measure_images`); `shape`: the tables' shape."""

        def measure(image: Tensor, target: Target) -> tuple[MomentTable, int]:
            return measure_image(self, options, image.to(world.device), target)

        begun = time.monotonic()
        empty, folder = State(self.fingerprint, MomentTable(shape)), self.folder / "state" / self.figure
        table = measure_images(measure, self.dataset, world, folder, empty, self.workers, image_ids=list(self.sizes))
        self.seconds = time.monotonic() - begun
        return table


MeasureImage = Callable[[Study, Any, Tensor, Target], tuple[MomentTable, int]]
"""(study, options, image `Tensor[3, H, W]` uint8 on the device, its target) -> (its moments, number of RoIs)."""


def open_study(figure: str, options: SlidingWindows | Pearson, world: World, **more: Any) -> Study:
    """Check the options, load the detectors and the annotations, and print what will be compared.

    Args:
        more: further plain values on which the measurement depends (see `fingerprint`).

    Raises:
        UserError: an option is invalid.
        CheckpointError: a checkpoint cannot be read.
        DataError: the data cannot be used, or their classes are not the detectors'.
    """
    if options.chunk < 1:
        raise UserError(f"--chunk is {options.chunk}, at least 1 is accepted")
    if options.objects is not None and options.objects < 1:
        raise UserError(f"--objects is {options.objects}, at least 1 is accepted")
    readers = open_readers(options.heads, world.device, seeds=True)
    classes, trained = readers[0].classes, readers[0].recipe.data
    groups = find_groups(classes, options.difficulty)
    with config_errors():
        config = data_config(trained, options.data)
        dataset = build_dataset(config, "val", classes=classes)
    folder = output_folder(options.out, world)
    annotations = dataset.annotations()
    sizes = first_objects(object_sizes(dataset.image_ids, annotations), options.objects)
    depends_on = fingerprint(
        readers, dataset, annotations, seed=options.seed, windows=windows.VERSION, objects=options.objects, **more
    )
    _check_seeds(depends_on["heads"])
    if world.is_main:
        names = ", ".join(dict.fromkeys(reader.name for reader in readers))
        say(f"{figure}: {names} on {len(sizes)} images of {dataset.name}")
        if len({[reader.name for reader in readers].count(reader.name) for reader in readers}) > 1:
            say("heads with different numbers of seeds have no differences, which are taken seed by seed")
        for line in describe(groups, classes, sizes):
            say(line)
    return Study(figure, readers, dataset, config.workers, groups, sizes, folder, depends_on)


def first_objects(sizes: Mapping[int, Tensor], objects: int | None) -> dict[int, Tensor]:
    """The first images that together have at least so many objects; None, or too many: all."""
    chosen, count = {}, 0
    for image_id, own in sizes.items():
        if objects is not None and count >= objects:
            break
        chosen[image_id] = own
        count += len(own)
    return chosen


def _check_seeds(heads: list[list[Any]]) -> None:
    """`heads`: of the fingerprint; each begins with the head's name, and the rest says which model and read-out."""
    for number, (name, *what) in enumerate(heads):
        if [name, *what] in heads[:number]:
            raise UserError(f"{name}: the same model is given twice, so these are not two seeds")
