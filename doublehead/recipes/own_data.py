"""`own-data`: a recipe that fits the data and the device.

`Facts` is what it asks of the data, `adapt` fills in what the user left open.  The rules below `adapt` stand in the
order in which they apply, with their reasons.  Numbers without a source are ours, chosen with photographs of blood
cells and generated pictures.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Literal, Protocol

from doublehead.config import AugmentConfig, DataConfig, ModelConfig, Recipe, RPNConfig

from .small import small_model

NAME = "own-data"
ABOUT = "your own data (--data.root DIR): model, sizes and steps fit the images, the boxes and the device"


class AnnotatedImages(Protocol):
    """What `Facts.of` reads of a data set; see `doublehead.data.DetectionDataset`."""

    classes: list[str]
    image_ids: list[int]
    image_sizes: list[tuple[int, int]]

    def annotations(self) -> list[dict[str, Any]]:
        """Annotations in COCO's form: `bbox` is x, y, width, height."""


@dataclass(frozen=True)
class Facts:
    """What the recipe depends on: training images, their boxes, and where it will run."""

    images: int
    classes: int
    image_sizes: Sequence[tuple[int, int]]
    """(height, width) of each training image, in pixels."""
    box_sides: Sequence[float]
    """Square root of each box's area, as a share of its image's short side."""
    device: Literal["cpu", "cuda"] = "cpu"
    processes: int = 1
    validation_images: int = 0

    @classmethod
    def of(
        cls,
        training: AnnotatedImages,
        device: Literal["cpu", "cuda"] = "cpu",
        processes: int = 1,
        validation_images: int = 0,
    ) -> Facts:
        """The facts of a training set; crowds and boxes without area are left out."""
        short = {i: min(size) for i, size in zip(training.image_ids, training.image_sizes, strict=True)}
        areas = (
            (short[item["image_id"]], item["bbox"][2] * item["bbox"][3])
            for item in training.annotations()
            if not item.get("iscrowd")
        )
        sides = [math.sqrt(area) / side for side, area in areas if area > 0]
        return cls(
            len(training.image_ids), len(training.classes), training.image_sizes, sides,
            device, processes, validation_images,
        )  # fmt: skip

    @property
    def short_side(self) -> float:
        """Of the median image, in pixels."""
        return median(map(min, self.image_sizes))

    @property
    def elongation(self) -> float:
        """Long side through short side; one image in ten is longer.  At most 2: panoramas are resized to less."""
        return min(2.0, _quantile([max(size) / min(size) for size in self.image_sizes], 0.9))

    @property
    def small_box(self) -> float:
        """One box in twenty is smaller; as `box_sides`."""
        return _quantile(self.box_sides or [0.25], 0.05)

    @property
    def median_box(self) -> float:
        """As `box_sides`."""
        return _quantile(self.box_sides or [0.25], 0.5)


def adapt(recipe: Recipe, facts: Facts, given: Collection[str], keep_model: bool = False) -> Recipe:
    """`recipe` with values that fit `facts`, in all fields that have a rule and that the user did not set.

    Args:
        given: dotted names of the fields that the user set, such as `train.steps`; the rules follow them.
        keep_model: the training starts from a whole detector: its model stays as it is in `recipe`, but for images
            that would be too small for the boxes, and the learning rate is lower.
    """
    fields = _Fields(recipe, frozenset(given))
    if keep_model:
        _images_of_kept_model(fields, facts)
    elif facts.device == "cpu":
        _small_model(fields, facts)
    else:
        _paper_model(fields, facts)
    _optimiser(fields, facts, keep_model)
    _length(fields, facts)
    _schedule(fields)
    _rhythm(fields, facts)
    _augmentation(fields, facts)
    return fields.recipe


# ---------------------------------------------------------------------------------------------
# The rules


def _short_side(facts: Facts) -> int:
    """To which images are resized."""
    if facts.device == "cpu":
        # The smallest boxes get 16 pixels, the finest map having one cell for 4.  More than 256 take too long, as the
        # time grows with the square.
        side = _clipped(16 / facts.small_box, 128, min(256, max(128, 2 * facts.short_side)))
    else:
        # The images' own size, but what ImageNet's features know (400) at least; more, up to the paper's 800, if the
        # smallest boxes need it for the smallest anchor of a pyramid, 32 pixels (Lin et al. 2017).
        side = _clipped(32 / facts.small_box, _clipped(facts.short_side, 400, 640), 800)
    return 32 * round(side / 32)  # a ResNet's coarsest stride


def _small_model(fields: _Fields, facts: Facts) -> None:
    """On a CPU: a narrow Double-Head-Ext on ResNet-18 from scratch, as of `bccd-small`."""
    _image_size(fields, facts)
    side = fields.recipe.model.image.min_size[-1]
    small = small_model(side, side, _anchors(facts, side))
    for part in ("backbone", "head", "roi", "rpn"):
        fields.set(f"model.{part}", getattr(small, part))


def _paper_model(fields: _Fields, facts: Facts) -> None:
    """On a GPU: the paper's Double-Head-Ext on ResNet-50 with ImageNet's weights."""
    _image_size(fields, facts)
    paper = ModelConfig(rpn=RPNConfig(_anchors(facts, fields.recipe.model.image.min_size[-1]), straddle=0.0))
    for part in ("backbone", "head", "roi", "rpn"):
        fields.set(f"model.{part}", getattr(paper, part))


def _images_of_kept_model(fields: _Fields, facts: Facts) -> None:
    """A detector of such small images that boxes vanish gets larger ones: convolutions know no image size."""
    image = fields.recipe.model.image
    side = min(image.min_size[-1], image.max_size / facts.elongation)
    if facts.small_box * side < 16 and side < _short_side(facts):
        _image_size(fields, facts)


def _image_size(fields: _Fields, facts: Facts) -> None:
    fields.set("model.image.min_size", (_short_side(facts),))
    long_side = max(fields.recipe.model.image.min_size) * facts.elongation
    fields.set("model.image.max_size", 32 * math.ceil(long_side / 32 - 1e-6))


def _anchors(facts: Facts, short_side: int) -> tuple[float, ...]:
    """One size for each level, twice the one below (Lin et al. 2017): of the median box, and down to the smallest."""
    smallest, middle = (max(1.0, side * short_side) for side in (facts.small_box, facts.median_box))
    first = middle / 2 ** round(math.log2(middle / smallest))
    while first > 32 * math.sqrt(2):
        first /= 2
    while first < 8:
        first *= 2
    return tuple(float(round(first * 2**level)) for level in range(5))


def _optimiser(fields: _Fields, facts: Facts, keep_model: bool) -> None:
    train = fields.recipe.train
    parts = facts.processes * train.accumulate  # they share a batch evenly
    fields.set("train.batch_size", parts * math.ceil((4 if facts.device == "cpu" else 8) / parts))
    # In few steps from scratch, AdamW gets further.  Frozen norms tell that a backbone was trained before, and SGD is
    # what such detectors are trained with.
    scratch = fields.recipe.model.backbone.norm != "frozen_batch_norm"
    fields.set("train.optimizer", "adamw" if scratch else "sgd")
    batch_size = fields.recipe.train.batch_size
    if fields.recipe.train.optimizer == "adamw":
        rate = 0.001 * math.sqrt(batch_size / 4)  # with the batch's root: Malladi et al. 2022
        fields.set("train.bias_lr_factor", 1.0)
        fields.set("train.weight_decay", 0.01)
        fields.set("train.clip_grad_norm", 10.0)
    else:
        rate = 0.01 * batch_size / 8  # the paper's; with the batch: Goyal et al. 2017
        fields.set("train.bias_lr_factor", 2.0)
        fields.set("train.weight_decay", 1e-4)
        fields.set("train.clip_grad_norm", 35.0)  # MMDetection's: stops only what would diverge
    # A trained detector is to change less; its new classifier still has to learn.
    fields.set("train.lr", float(f"{rate / 2 if keep_model else rate:.3g}"))
    fields.set("train.amp", "off" if facts.device == "cpu" else "bf16")


def _length(fields: _Fields, facts: Facts) -> None:
    """The number of steps."""
    train, image = fields.recipe.train, fields.recipe.model.image
    one_pass = facts.images / train.batch_size
    if train.epochs is not None and "train.epochs" in fields.given:
        steps = train.epochs * one_pass
    elif facts.device == "cpu":
        # 94 million pixels, ten minutes on two cores: `bccd-small`'s 480 steps of 4 images of 192 x 256.  Four passes
        # for more images than that reaches, within four times as long.
        pixels = train.batch_size * image.min_size[-1] ** 2 * facts.elongation
        budget = max(94_371_840 / pixels, 1600 / train.batch_size)
        steps = _clipped(4 * one_pass, budget, 4 * budget)
    else:
        # 12 passes are COCO's usual schedule (Girshick et al. 2018).  Fewer images need more of them: the heads are
        # new, and a few minutes are there.
        steps = max(12 * one_pass, 12_000 / train.batch_size)
    if train.epochs is None:
        # Beyond a hundred passes a few images are only learnt by heart; but 200 steps it must have in any case.
        steps = max(200, min(steps, 100 * one_pass))
    fields.set("train.steps", max(1, math.ceil(steps - 1e-6)))


def _schedule(fields: _Fields) -> None:
    given, steps = fields.given, fields.recipe.train.steps
    # Along a cosine the rate needs no milestones, which would depend on the data.
    fields.set("train.schedule", "step" if {"train.milestones", "train.gamma"} & given else "cosine")
    milestones = (2 * steps // 3, 8 * steps // 9) if fields.recipe.train.schedule == "step" else ()  # the paper's
    fields.set("train.milestones", milestones)
    fields.set("train.warmup_steps", min(500, steps // 10))


def _rhythm(fields: _Fields, facts: Facts) -> None:
    """How often it evaluates, saves and logs."""
    train = fields.recipe.train
    steps, seen = train.steps, train.steps * train.batch_size
    # Five evaluations, fewer if they would take long beside the training.
    evaluations = _clipped(seen // (2 * max(1, facts.validation_images)), 1, 5)
    fields.set("train.eval_every", math.ceil(steps / evaluations) if evaluations > 1 else 0)
    fields.set("train.checkpoint_every", min(1000, math.ceil(steps / 10)))
    fields.set("train.log_every", _clipped(steps // 20, 1, 20))


def _augmentation(fields: _Fields, facts: Facts) -> None:
    """More, the more often each image is seen: what is seen a few times is not learnt by heart, only learnt slower.

    In 9 passes over 205 photographs of blood cells, `little` cost 2.6 points of AP (one seed).
    """
    train = fields.recipe.train
    passes = train.steps * train.batch_size / facts.images
    little, much = AugmentConfig(scale=(0.8, 1.25), colour=0.1), AugmentConfig(scale=(0.5, 2.0), crop=0.3, colour=0.3)
    fields.set("train.augment", AugmentConfig() if passes <= 20 else little if passes <= 50 else much)


def describe(recipe: Recipe, facts: Facts) -> str:
    """What was chosen, in one line."""
    image, train = recipe.model.image, recipe.train
    passes = train.steps * train.batch_size / facts.images
    anchors = recipe.model.rpn.anchor_sizes
    return (
        f"images of {image.min_size[-1]} x {image.max_size} pixels at most, anchors from {anchors[0]:g} to "
        f"{anchors[-1]:g}, {train.steps} steps of {train.batch_size} images ({passes:.3g} passes), {train.optimizer} "
        f"with rate {train.lr:g}"
    )


# ---------------------------------------------------------------------------------------------


class _Fields:
    """A recipe whose fields are set one by one, but for those that the user gave."""

    def __init__(self, recipe: Recipe, given: frozenset[str]) -> None:
        self.recipe, self.given = recipe, given

    def set(self, name: str, value: Any) -> None:
        """Set the field with that dotted name, or all fields of that group."""
        for leaf, part in _leaves(name, value):
            if not any(f"{leaf}.".startswith(f"{one}.") for one in self.given):
                self.recipe = _with(self.recipe, leaf.split("."), part)


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not dataclasses.is_dataclass(value):
        yield name, value
        return
    for field in dataclasses.fields(value):
        yield from _leaves(f"{name}.{field.name}", getattr(value, field.name))


def _with(config: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    return replace(config, **{name: _with(getattr(config, name), rest, value) if rest else value})


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[int(share * (len(ordered) - 1))]


def _clipped(value: float, least: float, most: float) -> Any:
    return max(least, min(value, most))


_ORDINARY = Facts(500, 3, [(480, 640)], [0.1])


def own_data_recipes() -> list[Recipe]:
    """`own-data` as it is for 500 ordinary images on a CPU, until it knows better."""
    return [adapt(Recipe(NAME, ABOUT, data=DataConfig("auto")), _ORDINARY, ())]
