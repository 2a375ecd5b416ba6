"""The common setup of the statistics over objects (Figures 2, 3 and 7): readers, images, groups and states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from doublehead.analysis import windows
from doublehead.analysis.groups import Group, describe, find_groups, object_sizes
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
    """Image id -> size of each object, see `object_sizes`."""
    folder: Path
    fingerprint: dict[str, Any]

    def measure(
        self, measure_image: MeasureImage, options: SlidingWindows | Pearson, shape: Sequence[int], world: World
    ) -> MomentTable:
        """The merged results of `measure_image` for all images (see `measure_images`); `shape`: the tables' shape."""

        def measure(image: Tensor, target: Target) -> tuple[MomentTable, int]:
            return measure_image(self, options, image.to(world.device), target)

        empty = State(self.fingerprint, MomentTable(shape))
        return measure_images(measure, self.dataset, world, self.folder / "state" / self.figure, empty, self.workers)


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
    readers = open_readers(options.heads, world.device)
    classes, trained = readers[0].classes, readers[0].recipe.data
    groups = find_groups(classes, options.difficulty)
    with config_errors():
        config = data_config(trained, options.data)
        dataset = build_dataset(config, "val", classes=classes)
    folder = output_folder(options.out, world)
    annotations = dataset.annotations()
    sizes = object_sizes(dataset.image_ids, annotations)
    if world.is_main:
        say(f"{figure}: {', '.join(reader.name for reader in readers)} on {len(dataset)} images of {dataset.name}")
        for line in describe(groups, classes, sizes):
            say(line)
    depends_on = fingerprint(readers, dataset, annotations, seed=options.seed, windows=windows.VERSION, **more)
    return Study(figure, readers, dataset, config.workers, groups, sizes, folder, depends_on)
