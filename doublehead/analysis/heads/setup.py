"""What all trainings of `analyze heads` share: the frozen detector, the data, and which heads to train."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from doublehead.analysis.heads import features
from doublehead.analysis.heads.reading import readables
from doublehead.analysis.heads.specs import HeadSpec, Member, distinct_heads, parse_variant, plan, varied
from doublehead.analysis.options import Heads
from doublehead.analysis.output import output_folder
from doublehead.config import Recipe
from doublehead.data import DetectionDataset, build_dataset
from doublehead.engine.checkpoint import LoadedModel, load_model
from doublehead.engine.data_options import data_config
from doublehead.engine.distributed import World
from doublehead.engine.schedule import scaled
from doublehead.errors import UserError, config_errors
from doublehead.models import DoubleHeadRCNN
from doublehead.models.heads import build_head


@dataclass
class Setup:
    """All that the trainings share."""

    options: Heads
    start: LoadedModel
    model: DoubleHeadRCNN
    """The frozen detector, in eval mode."""
    recipe: Recipe
    """The base: the detector's, with `--set` and the number of steps."""
    members: list[Member]
    specs: list[HeadSpec]
    train_set: DetectionDataset
    val_set: DetectionDataset
    folder: Path
    digest: str
    """Of all that a training depends on besides its seed."""

    def features(self, train: bool) -> features.FeatureFile:
        """The features of the training or the validation images, which `build` has made."""
        dataset = self.train_set if train else self.val_set
        wanted = features.fingerprint(self.model, dataset, train, self.mirrored and train)
        return features.FeatureFile(features_folder(self.folder, train), wanted, self.device)

    @property
    def mirrored(self) -> bool:
        """Whether training mirrors images."""
        return self.recipe.train.horizontal_flip > 0

    @property
    def device(self) -> torch.device:
        """Of the detector."""
        return self.model.transform.device_marker.device

    @property
    def pauses(self) -> list[int]:
        """The steps after which all heads are evaluated, ascending; the last is the last step."""
        steps = self.options.steps
        given = self.options.evaluate_at or tuple(steps // 2**n for n in range(5))
        return sorted({step for step in given if 0 < step < steps} | {steps})


def open_setup(options: Heads, world: World) -> Setup:
    """Load the detector and the data, and find out what is to be trained.

    Raises:
        UserError: see `run`.
    """
    _check(options)
    start = load_model(options.checkpoint)
    if start.recipe.model.backbone.neck != "fpn":
        raise UserError(f"{options.checkpoint}: has no feature pyramid, and its head is the ResNet's last stage")
    data = data_config(start.recipe.data, options.data)
    if options.train_images is not None:
        data = replace(data, train_images=options.train_images)
    recipe = replace(start.recipe, data=data)
    train = replace(recipe.train, steps=options.steps, epochs=None)
    recipe = replace(recipe, train=scaled(train, recipe.train.steps))
    changes = {name: value for text in options.set for name, value in parse_variant(text).items()}
    recipe = varied(recipe, changes, "--set")
    variants = {text: parse_variant(text) for text in options.vary}
    with config_errors():
        members = plan(recipe, options.kinds, variants, options.varied_kinds)
        train_set = build_dataset(
            recipe.data, "train", classes=start.classes, horizontal_flip=recipe.train.horizontal_flip
        )
        val_set = build_dataset(recipe.data, "val", classes=start.classes)
        for member in members:
            if not readables([member], every=False):
                raise UserError(f"{member.variant}: {member.kind}: no head learns what every read-out needs")
        specs = distinct_heads(members)
        with torch.device("meta"):  # fields may contradict each other: better now than after the features
            for spec in specs:
                build_head(spec.branch, spec.head, spec.roi, recipe.model.backbone.fpn_channels, len(start.classes) + 1)
    for spec in specs:
        if options.images % spec.train.accumulate:
            raise UserError(
                f"--images {options.images} cannot be divided into train.accumulate {spec.train.accumulate}"
            )
    digest = hashlib.sha256(repr((options.steps, options.images, options.evaluate_at, options.windows, specs)).encode())
    for train_features in (True, False):
        dataset = train_set if train_features else val_set
        digest.update(features.fingerprint(start.model, dataset, train_features, True).encode())
    model = start.model.to(world.device, memory_format=torch.channels_last).eval()
    folder = output_folder(options.out, world)
    return Setup(
        options, start, model, recipe, members, specs, train_set, val_set, folder, digest.hexdigest()
    )  # fmt: skip


def _check(options: Heads) -> None:
    if not options.checkpoint:
        raise UserError("no CHECKPOINT is named: the detector whose backbone and RPN are kept")
    for name, value, least in (
        ("--steps", options.steps, 1), ("--images", options.images, 1), ("--windows", options.windows, 0),
        ("--save-every", options.save_every, 1), ("--train-images", options.train_images, 1),
    ):  # fmt: skip
        if value is None:
            continue
        if value < least:
            raise UserError(f"{name} is {value}, at least {least} is accepted")
    _check_list("--seeds", options.seeds)
    _check_list("--kinds", options.kinds)
    for option, kinds in (("--kinds", options.kinds), ("--varied-kinds", options.varied_kinds)):
        if "conv5" in kinds:
            raise UserError(f"{option}: conv5 is the head of a backbone without a pyramid, its last stage")
    if min(options.seeds) < 0:
        raise UserError(f"--seeds: {min(options.seeds)} is no seed, numbers from 0 on are accepted")
    if wrong := [step for step in options.evaluate_at if not 0 < step <= options.steps]:
        raise UserError(f"--evaluate-at {wrong[0]}: there is no such step among 1 .. {options.steps}")


def _check_list(option: str, values: Sequence[Any]) -> None:
    if not values:
        raise UserError(f"{option}: name at least one")
    if repeated := [value for value in values if values.count(value) > 1]:
        raise UserError(f"{option}: {repeated[0]} is named twice")


def features_folder(folder: Path, train: bool) -> Path:
    return folder / "features" / ("train" if train else "val")
