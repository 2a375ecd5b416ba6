"""All heads of one seed, trained side by side on the same RoIs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from doublehead.analysis.heads.features import FeatureFile, ImageFeatures
from doublehead.analysis.heads.learner import Learner, Part
from doublehead.analysis.heads.specs import HeadSpec
from doublehead.config import RoIConfig
from doublehead.data.loader import TrainBatches, is_flipped
from doublehead.engine.logs import say
from doublehead.engine.optim import seed_step
from doublehead.engine.signals import Stopped, StopSignals
from doublehead.models.heads import box_scale
from doublehead.models.losses import sample_rois
from doublehead.models.roi_pooling import RoIPooling
from doublehead.models.structures import RoISamples
from doublehead.ops.boxes import encode_boxes

SAY_SECONDS = 60.0
"""Without a terminal, how often the progress is printed."""
Pooled = dict[tuple[RoIConfig, float], Tensor]
"""(how RoIs are pooled, box scale) -> `Tensor[N, C, S, S]`."""


class SideBySide:
    """Trains heads on the same images and, where they sample alike, on the very same RoIs.

    Args:
        specs: the heads.
        features: of the training images.
        strides: pixels per cell of each map.
        num_classes: with background.
        seed: of initial weights, order of images and sampling.
        steps, images: number of steps, and of images in each.
        mirrored: probability of a mirrored image.
    """

    def __init__(
        self,
        specs: Sequence[HeadSpec],
        features: FeatureFile,
        strides: Sequence[int],
        num_classes: int,
        seed: int,
        steps: int,
        images: int,
        mirrored: float,
    ) -> None:
        self.features, self.strides = features, strides
        self.seed, self.steps, self.images, self.mirrored = seed, steps, images, mirrored
        self.learners = {
            spec: Learner(spec, features.index["channels"], num_classes, seed, features.device) for spec in specs
        }
        self.step = 0
        self.rois: dict[RoIConfig, int] = {}
        """How RoIs are sampled -> how many heads that sample so have seen."""
        self.seconds = 0.0
        """Of training alone, earlier parts included."""

    def run(
        self,
        pauses: Sequence[int],
        on_pause: Callable[[], None],
        save_every: int,
        on_save: Callable[[], None],
        shown: bool,
    ) -> None:
        """Train to the end.

        Args:
            pauses: steps after which `on_pause` is called, and then `on_save`.
            save_every: `on_save` is called each so many steps too.
            shown: show a bar.

        Raises:
            Stopped: after SIGTERM or Ctrl-C, when the running step is done and saved.
            NonFiniteLossError: a head diverged.
        """
        bar = tqdm(
            total=self.steps, initial=self.step, desc=f"seed {self.seed}", unit="step", disable=None if shown else True
        )
        batches = self._batches()
        first, before, said = self.step, self.seconds, time.monotonic()
        with StopSignals() as stop, bar:
            while self.step < self.steps:
                begun = time.monotonic()
                self._train(next(batches))
                self.step += 1
                self.seconds += time.monotonic() - begun
                paused = self.step in pauses
                if due := paused or self.step % save_every == 0 or bool(stop.received):
                    for learner in self.learners.values():
                        learner.check()
                if paused:
                    on_pause()
                if due or stop.received:  # it may have come while evaluating
                    on_save()
                bar.update()
                if shown and bar.disable and time.monotonic() - said >= SAY_SECONDS:  # no terminal: plain lines
                    each, said = (self.seconds - before) / (self.step - first), time.monotonic()
                    minutes = (self.steps - self.step) * each / 60
                    say(f"seed {self.seed}, step {self.step} of {self.steps}, {minutes:.0f} minutes of training left")
                if stop.received:
                    raise Stopped(stop.received)

    def _batches(self) -> Iterator[list[ImageFeatures]]:
        """The images of each step from the present one on; the same order as in a training of this seed."""
        count = 1 + max(item["index"] for item in self.features.index["items"])
        groups = np.zeros(count, np.int64)
        for batch in TrainBatches(groups, self.images, self.seed, 0, 1, self.step):
            flips = [is_flipped(self.seed, epoch, index, self.mirrored) for epoch, index in batch]
            yield [self.features[index, flip] for (_, index), flip in zip(batch, flips, strict=True)]

    def _train(self, images: list[ImageFeatures]) -> None:
        for sampling, learners in _grouped(self.learners.values(), lambda spec: sampling_of(spec.roi)).items():
            seed_step(self.seed, self.step)  # so that no group's draws depend on the others
            rois = [sample_rois(image.proposals, image.targets, sampling) for image in images]
            self.rois[sampling] = self.rois.get(sampling, 0) + sum(int(one.valid.sum()) for one in rois)
            pools = {pool_key(learner.spec) for learner in learners}
            pooled = [pool(image, one.boxes, pools, self.strides) for image, one in zip(images, rois, strict=True)]
            for learner in learners:
                learner.step(self.step, make_parts(learner.spec, rois, pooled))

    def state_dict(self) -> dict[str, Any]:
        """All that the coming steps depend on; tensors and plain values."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "rois": list(self.rois.values()),
            "learners": [learner.state_dict() for learner in self.learners.values()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave for the same heads."""
        for learner, values in zip(self.learners.values(), state["learners"], strict=True):
            learner.load_state_dict(values)
        samplings = _grouped(self.learners.values(), lambda spec: sampling_of(spec.roi))
        self.rois = dict(zip(samplings, state["rois"], strict=True))
        self.step, self.seconds = state["step"], state["seconds"]


def sampling_of(roi: RoIConfig) -> RoIConfig:
    """The fields that decide which RoIs are drawn; all others have their defaults."""
    return replace(
        RoIConfig(),
        samples=roi.samples, positive_fraction=roi.positive_fraction, positive_iou=roi.positive_iou,
    )  # fmt: skip


def pool_key(spec: HeadSpec) -> tuple[RoIConfig, float]:
    """How a head's RoIs are pooled, and by which factor they are enlarged; the other fields have their defaults."""
    default = RoIConfig()
    how = replace(
        spec.roi,
        samples=default.samples, positive_fraction=default.positive_fraction, positive_iou=default.positive_iou,
        fc_box_scale=1.0, conv_box_scale=1.0, box_weights=default.box_weights,
    )  # fmt: skip
    return how, box_scale(spec.branch, spec.roi)


def pool(image: ImageFeatures, boxes: Tensor, pools: set[tuple[RoIConfig, float]], strides: Sequence[int]) -> Pooled:
    """The pooled maps of an image's boxes `Tensor[1, R, 4]` in each of the ways of `pools`."""
    pooled: Pooled = {}
    for how in {how for how, _ in pools}:
        scales = sorted(scale for other, scale in pools if other == how)
        maps = RoIPooling(how, scales, strides)(image.maps, boxes)
        pooled |= {(how, scale): values for scale, values in maps.items()}
    return pooled


def make_parts(spec: HeadSpec, rois: Sequence[RoISamples], pooled: Sequence[Pooled]) -> list[Part]:
    """A step's RoIs as a head sees them: all together, or with `train.accumulate` in so many parts of whole images."""
    key, count = pool_key(spec), spec.train.accumulate
    parts = []
    for start in range(0, len(rois), len(rois) // count):
        several = range(start, min(len(rois), start + len(rois) // count))
        wanted = [
            encode_boxes(rois[i].matched_boxes, rois[i].boxes, spec.roi.box_weights).flatten(0, 1) for i in several
        ]
        parts.append(
            Part(
                torch.cat([pooled[i][key] for i in several]),
                torch.cat([rois[i].labels.flatten() for i in several]),
                torch.cat([rois[i].valid.flatten() for i in several]),
                torch.cat(wanted),
            )
        )
    return parts


def _grouped(learners: Any, key: Callable[[HeadSpec], Any]) -> dict[Any, list[Learner]]:
    groups: dict[Any, list[Learner]] = {}
    for learner in learners:
        groups.setdefault(key(learner.spec), []).append(learner)
    return groups
