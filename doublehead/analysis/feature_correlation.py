"""Spatial correlation of the heads' input and output maps (Figure 8).

Every ground-truth object's box is a RoI.  The input of each head is its pooled S x S map.  The output of a conv-head is
its map before the average over cells.  An fc-head has no output map; one is made by splitting the first layer's weight
into one C x dim matrix for each cell, which multiplies that cell's features (without bias and ReLU, which apply to the
sum over the cells).  The correlation of two cells is the cosine of their feature vectors, averaged over the objects.

Cosines are summed as integers, so the result does not depend on the number of processes or on interruptions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from doublehead.analysis.cell_maps import (
    PAIR,
    checkpoint_specs,
    draw_cell_maps,
    mean_of_pairs,
    pair_limits,
    pair_rows,
)
from doublehead.analysis.options import FeatureCorrelation
from doublehead.analysis.output import output_folder, save_figure, write_csv
from doublehead.analysis.readers import Reader, open_readers
from doublehead.analysis.shards import fingerprint, measure_images
from doublehead.analysis.states import State
from doublehead.data import Target, build_dataset
from doublehead.engine.data_options import data_config
from doublehead.engine.distributed import World
from doublehead.engine.logs import say
from doublehead.errors import UserError, config_errors
from doublehead.models.towers import FCTower, Tower

UNIT = 2**30  # a cosine of 1 as an integer; int64 then holds the sum of 2**33 objects
MAPS = ("input", "output")
Key = tuple[str, str]
"""(head, one of `MAPS`)."""


@dataclass
class CosineSum:
    """The cosines of an S x S map's cells, summed over objects."""

    total: Tensor
    """`Tensor[S*S, S*S]` int64: the sum of round(cosine * UNIT)."""
    count: Tensor
    """`Tensor[S*S, S*S]` int64: the number of objects in each sum."""
    objects: int = 0
    zeros: int = 0
    """The number of zero feature vectors, which have no cosine with any other."""

    def __add__(self, other: CosineSum) -> CosineSum:
        total, count = self.total + other.total, self.count + other.count
        return CosineSum(total, count, self.objects + other.objects, self.zeros + other.zeros)

    @property
    def possible(self) -> bool:
        """Whether simple bounds allow these sums."""
        total, count = self.total, self.count
        if total.dtype != torch.int64 or count.dtype != torch.int64 or total.dim() != 2 or total.shape != count.shape:
            return False
        if total.shape[0] != total.shape[1] or type(self.objects) is not int or type(self.zeros) is not int:
            return False
        cells = len(total) * self.objects
        counted = bool((count >= 0).all() & (count <= self.objects).all()) and 0 <= self.zeros <= cells
        return counted and bool((total.abs() <= count * (UNIT + 1)).all())

    def mean(self) -> np.ndarray:
        """The mean cosines, float64 [S*S, S*S]; NaN where no object had one."""
        mean = self.total.double() / UNIT / self.count
        return mean.masked_fill(self.count == 0, torch.nan).numpy()


class CosineTable:
    """A `CosineSum` for each map of each head; a `shards.Summary`."""

    def __init__(self, sums: dict[Key, CosineSum] | None = None) -> None:
        self.sums = sums or {}

    def empty(self) -> CosineTable:
        """A table without objects."""
        return CosineTable()

    def merge(self, other: CosineTable) -> None:
        """Add the sums of another table."""
        for key, value in other.sums.items():
            self.sums[key] = self.sums[key] + value if key in self.sums else value

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "sums": [
                [*key, value.total.tolist(), value.count.tolist(), value.objects, value.zeros]
                for key, value in self.sums.items()
            ]
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CosineTable:
        """Rebuild a table from the result of `to_dict`.

        Raises:
            ValueError, TypeError, KeyError, RuntimeError: the values are not such a result, or the sums are impossible.
        """
        sums = {}
        for head, which, total, count, objects, zeros in values["sums"]:
            if not isinstance(head, str) or which not in MAPS or (head, which) in sums:
                raise ValueError(f"map {which!r:.40} of head {head!r:.40} is unknown, or there twice")
            sums[head, which] = CosineSum(torch.tensor(total), torch.tensor(count), objects, zeros)
            if not sums[head, which].possible:
                raise ValueError(f"map {which!r} of head {head!r:.40} has sums that no objects have")
        return cls(sums)


def run(options: FeatureCorrelation, world: World) -> None:
    """Write `feature-correlation.csv` and `feature-correlation.png`.

    Raises:
        UserError: no checkpoint is named, their classes differ, or the data cannot be used or hold no object.
        CheckpointError: a checkpoint cannot be read.
    """
    checkpoint_specs(options.checkpoints)
    readers = open_readers(options.checkpoints, world.device)
    with config_errors():
        data = data_config(readers[0].recipe.data, options.data)
        dataset = build_dataset(data, "val", classes=readers[0].classes)
    out = output_folder(options.out, world)
    if world.is_main:
        say(f"{len(dataset)} images of {dataset.name}")

    def measure(image: Tensor, target: Target) -> tuple[CosineTable, int]:
        return measure_image(readers, image.to(world.device), target), len(target["boxes"])

    state = State(fingerprint(readers, dataset, dataset.annotations()), CosineTable())
    folder = out / "state" / "feature-correlation"
    table = measure_images(measure, dataset, world, folder, state, data.workers, counted="objects")
    world.on_main(lambda: write_results(table, out))


def measure_image(readers: list[Reader], image: Tensor, target: Target) -> CosineTable:
    """The sums over an image's objects, for all maps of all heads; `image`: `Tensor[3, H, W]` uint8."""
    table = CosineTable()
    if len(target["boxes"]):
        for reader in readers:
            maps = head_maps(reader, image, target["boxes"])
            table.merge(CosineTable({key: cosine_sum(features) for key, features in maps.items()}))
    return table


@torch.inference_mode()
def head_maps(reader: Reader, image: Tensor, boxes: Tensor) -> dict[Key, Tensor]:
    """The input and output map of every head.

    Args:
        image: `Tensor[3, H, W]` uint8.
        boxes: `Tensor[K, 4]`, in its pixels.

    Returns:
        (head, map) -> `Tensor[K, C, S, S]`.
    """
    detector = reader.model.detector
    features = reader.features(image, boxes)
    rois = torch.cat((features.boxes.new_zeros(len(boxes), 1), features.boxes), dim=1)
    pooled = detector.roi_pooling(features.maps, rois)
    found = {}
    for name, head in detector.heads.items():
        x = pooled[detector.heads.box_scales[name]]
        found[f"{reader.name}, {name}", "input"] = x
        found[f"{reader.name}, {name}", "output"] = output_map(head.tower, x)
    return found


def output_map(tower: Tower, x: Tensor) -> Tensor:
    """The map that a tower makes of `x` `Tensor[K, C, S, S]`: `Tensor[K, dim, S, S]` (see the module's text)."""
    if isinstance(tower, FCTower):
        return torch.einsum("kcyx,dcyx->kdyx", x, tower[1].weight.unflatten(1, x.shape[1:]))
    for block in tower.blocks:
        x = block(x)
    return x


def cosine_sum(features: Tensor) -> CosineSum:
    """The sums over K objects with `features` `Tensor[K, C, S, S]`."""
    cells = features.double().flatten(2).transpose(1, 2)  # [K, S*S, C]
    length = cells.norm(dim=2, keepdim=True)
    known = length.squeeze(2) > 0
    unit = cells / length.clamp(min=torch.finfo(torch.float64).tiny)
    cosines = (unit @ unit.transpose(1, 2) * UNIT).round().long()
    count = (known[:, :, None] & known[:, None, :]).long().sum(0)
    return CosineSum(cosines.sum(0).cpu(), count.cpu(), len(features), int((~known).sum()))


def write_results(table: CosineTable, out: Path) -> None:
    """Write the table and the figure, and print the means.

    Raises:
        UserError: the data hold no object.
    """
    sums = table.sums
    if not sums:
        raise UserError("the data have no object, so there is nothing to correlate: give data with annotations")
    means = {key: value.mean() for key, value in sums.items()}
    rows = [(*key, *row) for key, matrix in means.items() for row in pair_rows(matrix)]
    objects = [count for value in sums.values() for count in value.count.flatten().tolist()]
    lines = [(*row, count) for row, count in zip(rows, objects, strict=True)]
    write_csv(out / "feature-correlation.csv", ("head", "map", *PAIR, "cosine", "objects"), lines)
    save_figure(out / "feature-correlation.png", draw(means))
    for (head, which), value in sums.items():
        mean = mean_of_pairs(means[head, which])
        say(f"{head}, {which}: mean cosine of two cells {mean:.4f}, {value.objects} objects")
        if value.zeros:
            say(f"{head}, {which}: {value.zeros} feature vectors were zero; they have no cosine and are left out")
    say(f"{out}: feature-correlation.csv, feature-correlation.png")


def draw(means: dict[Key, np.ndarray]) -> Any:
    """A row for each head, with its input map on the left and its output map on the right; one colour scale."""
    from matplotlib.figure import Figure

    heads = list(dict.fromkeys(head for head, _ in means))
    figure = Figure(figsize=(11.6, 5.2 * len(heads)), layout="constrained")
    panels = figure.subplots(len(heads), 2, squeeze=False)
    limits = pair_limits(list(means.values()))
    for row, head in enumerate(heads):
        for axes, which in zip(panels[row], MAPS, strict=True):
            matrix = means[head, which]
            title = f"{head}: {which}, mean of two cells {mean_of_pairs(matrix):.2f}"
            shown = draw_cell_maps(axes, matrix, limits, title)
    figure.colorbar(shown, ax=panels, label="mean cosine of the cells' features", shrink=0.7 / len(heads) ** 0.5)
    figure.suptitle("Spatial correlation of the heads' maps (dot: the cell itself, always 1)")
    return figure
