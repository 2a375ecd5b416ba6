"""Batches: an endless, resumable stream for training, one ordered pass for evaluation.

Training batch k of a rank depends only on (seed, k, rank, world_size), not on the global random state or the number of
worker processes; so `start_step=k` continues a stream exactly.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from doublehead.config import AugmentConfig

from ..errors import DataError
from .dataset import DataWarning, DetectionDataset, Target
from .transforms import augmented, check_augmentation, horizontal_flip, is_off

Batch = tuple[list[Tensor], list[Target]]
Item = tuple[int, int]  # epoch, index


def build_loader(
    dataset: DetectionDataset,
    batch_size: int,
    *,
    train: bool,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    aspect_ratio_grouping: bool = False,
    start_step: int = 0,
    augment: AugmentConfig | None = None,
) -> Loader:
    """Batches of one rank.

    Args:
        batch_size: images per batch of this rank; together, the ranks form batches of `batch_size * world_size`, the
            same as a single process with that batch size.
        train: True: an endless shuffled stream, with images mirrored at random by `dataset.horizontal_flip`.
            False: every image once, in order, image i on rank i mod world_size; the last batch may be smaller.
        seed: seed of shuffling, mirroring and augmentation, >= 0.
        workers: number of processes that load images; 0: the calling process loads them.
        aspect_ratio_grouping: train only; no batch mixes landscape images (width >= height) with portrait images.
            Images that do not fill a batch are kept for the next epoch.
        start_step: train only; number of batches to skip.
        augment: train only; random changes besides mirroring (see `augmented`), which depend on seed, epoch and image
            alone.

    Raises:
        ValueError: an argument is out of range.
        DataError: an image cannot be decoded; raised while iterating.
    """
    for name, value, least in (
        ("batch_size", batch_size, 1), ("world_size", world_size, 1), ("workers", workers, 0),
        ("seed", seed, 0), ("start_step", start_step, 0), ("rank", rank, 0),
    ):  # fmt: skip
        if value < least:
            raise ValueError(f"{name} is {value}, at least {least} is accepted")
    if rank >= world_size:
        raise ValueError(f"rank is {rank}, below world_size {world_size} is accepted")
    if not train:
        return Loader(dataset, EvalBatches(len(dataset), batch_size, rank, world_size), None, workers)
    groups = [int(w < h) for h, w in dataset.image_sizes] if aspect_ratio_grouping else [0] * len(dataset)
    batches = TrainBatches(np.array(groups), batch_size, seed, rank, world_size, start_step)
    if augment is not None:
        check_augmentation(augment)
    return Loader(dataset, batches, seed, workers, augment)


class TrainBatches:
    """Endless batches of (epoch, index); each epoch is one permutation of the images."""

    def __init__(self, groups: np.ndarray, batch_size: int, seed: int, rank: int, world_size: int, start_step: int):
        self.groups = groups
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.start_step = start_step

    def __iter__(self) -> Iterator[list[Item]]:
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        to_skip = self.start_step
        for batches in self._epochs():
            for batch in batches[to_skip:]:
                yield [(int(epoch), int(index)) for epoch, index in batch[mine]]
            to_skip = max(0, to_skip - len(batches))

    def _epochs(self) -> Iterator[list[np.ndarray]]:
        """The global batches that are completed in epoch 0, 1, ..., each an array [batch, 2] of (epoch, index)."""
        size = self.batch_size * self.world_size
        waiting = {int(group): np.empty((0, 3), np.int64) for group in np.unique(self.groups)}
        epoch = 0
        while True:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.groups))
            items = np.stack([np.full_like(order, epoch), order, np.arange(len(order))], 1)
            full: list[np.ndarray] = []
            for group in waiting:
                queue = np.concatenate([waiting[group], items[self.groups[order] == group]])
                count = len(queue) // size
                full += list(queue[: count * size].reshape(count, size, 3))
                waiting[group] = queue[count * size :]
            # Batches are ordered by the position of their last image.
            full.sort(key=lambda batch: int(batch[-1, 2]))
            yield [batch[:, :2] for batch in full]
            epoch += 1


class EvalBatches:
    """Every index of one rank once, in order."""

    def __init__(self, length: int, batch_size: int, rank: int, world_size: int):
        self.indices = range(rank, length, world_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[Item]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[start : start + self.batch_size]]


class Loader:
    """Iterable of (list of images, list of targets); each `iter()` starts again at the first batch."""

    def __init__(
        self,
        dataset: DetectionDataset,
        batches: TrainBatches | EvalBatches,
        seed: int | None,
        workers: int,
        augment: AugmentConfig | None = None,
    ):
        self.dataset = dataset
        self._replaced: set[str] = set()
        self._loader = DataLoader(
            _Items(dataset, seed, augment),
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=_keep,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_leave_the_process_group,
            generator=torch.Generator(),  # separate, so that iterating does not advance the global random state
        )

    def __len__(self) -> int:
        """The number of batches; TypeError for a training stream, which is endless."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        for items in self._loader:
            for image, _, errors in items:
                if image is None:
                    raise errors[-1]
                for error in errors:
                    self._note(error)
            yield [image for image, _, _ in items], [target for _, target, _ in items]

    def _note(self, error: DataError) -> None:
        """Count an image that had to be replaced, and warn about it, once per file."""
        if str(error) not in self._replaced:
            self._replaced.add(str(error))
            self.dataset.skipped[error.reason] += 1
            if len(self._replaced) > self.dataset.max_replaced:
                count = f"{len(self._replaced)} of its {len(self.dataset)} images"
                raise DataError(f"{self.dataset.name}: {count} cannot be decoded, more than max_skipped "
                                f"(--data.max-skipped) allows; the last: {error}", error.reason)  # fmt: skip
            text = f"{self.dataset.name}: the next image takes the place of one left out. {error}"
            warnings.warn(text, DataWarning, stacklevel=3)


class _Items(Dataset):
    """(epoch, index) -> (image, target, errors).

    Errors are returned as values: a DataError raised in a worker process would arrive as a traceback, and a count kept
    there would be lost.
    """

    def __init__(self, dataset: DetectionDataset, seed: int | None, augment: AugmentConfig | None = None):
        self.dataset = dataset
        self.seed = seed
        self.augment = None if augment is None or is_off(augment) else augment

    def __getitem__(self, item: Item) -> tuple[Tensor | None, Target | None, list[DataError]]:
        epoch, index = item
        errors: list[DataError] = []
        image, target = None, None
        for candidate in range(index, index + (len(self.dataset) if self.dataset.replace_unreadable else 1)):
            try:
                image, target = self.dataset[candidate % len(self.dataset)]
                break
            except DataError as error:
                errors.append(error)
        if image is not None and self._flips(epoch, index):
            image, target = horizontal_flip(image, target)
        if image is not None and self.augment is not None and self.seed is not None:
            draws = np.random.default_rng((self.seed, epoch, index, 2))  # its own stream, as that of the flip
            image, target = augmented(image, target, self.augment, int(draws.integers(2**63)))
        return image, target, errors

    def _flips(self, epoch: int, index: int) -> bool:
        return self.seed is not None and is_flipped(self.seed, epoch, index, self.dataset.horizontal_flip)


def is_flipped(seed: int, epoch: int, index: int, probability: float) -> bool:
    """Whether training mirrors an image in an epoch."""
    # The trailing 1 separates this random stream from the permutation's.
    return bool(np.random.default_rng((seed, epoch, index, 1)).random() < probability)


def _keep(items: list) -> list:
    return items


def _leave_the_process_group(worker: int) -> None:
    """Leave Ctrl-C, and a SIGTERM to the process group, to the trainer alone, which saves its state before it ends."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
