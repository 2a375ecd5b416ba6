"""`own-data` fits the images, the boxes and the device, and changes nothing that the user set."""

import dataclasses
from dataclasses import replace

import pytest

from doublehead.config import AugmentConfig, TrainConfig, check
from doublehead.recipes import RECIPES
from doublehead.recipes.own_data import Facts, adapt, describe

OWN = RECIPES["own-data"]
CELLS = Facts(205, 3, [(480, 640)] * 205, [0.09] * 10 + [0.215] * 90, validation_images=87)
"""Of BCCD's images."""
MANY = Facts(118_000, 80, [(480, 640)] * 9 + [(640, 480)], [0.02] * 10 + [0.1] * 50 + [0.6] * 40)
FEW = Facts(12, 1, [(100, 90)], [0.4])
PHOTOS = Facts(2000, 5, [(3000, 4000)], [0.01, 0.02, 0.05])
STRIPS = Facts(300, 2, [(64, 4096)], [0.5])
NO_BOXES = Facts(5, 1, [(1, 1)], [])
ALL = (CELLS, MANY, FEW, PHOTOS, STRIPS, NO_BOXES)


def on_gpu(facts):
    return replace(facts, device="cuda")


def leaves(config, prefix=""):
    """Dotted name -> value of every field."""
    found = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        found |= leaves(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value}
    return found


@pytest.mark.parametrize("facts", [*ALL, *map(on_gpu, ALL)])
@pytest.mark.parametrize("keep_model", [False, True])
def test_it_is_a_recipe_for_any_data(facts, keep_model):
    recipe = adapt(OWN, facts, (), keep_model)
    check(recipe)
    train, image = recipe.train, recipe.model.image
    assert train.warmup_steps <= train.steps / 10 and train.steps >= 200
    assert image.max_size >= max(image.min_size) and image.max_size % 32 == image.min_size[0] % 32 == 0
    sizes = recipe.model.rpn.anchor_sizes
    assert len(sizes) == 5 and list(sizes) == sorted(sizes) and sizes[0] >= 8
    assert adapt(recipe, facts, (), keep_model) == recipe  # once is enough


def test_on_a_cpu_it_takes_the_time_of_the_cell_recipe():
    cells = RECIPES["bccd-small"]
    recipe = adapt(OWN, CELLS, ())
    assert recipe.model.image == cells.model.image and recipe.model.head == cells.model.head
    assert (recipe.train.steps, recipe.train.batch_size) == (cells.train.steps, cells.train.batch_size)
    assert recipe.train.eval_every == 96 and recipe.train.schedule == "cosine"
    assert recipe.model.backbone.weights is None and recipe.train.amp == "off"


def test_on_a_gpu_it_is_the_paper_s_detector():
    paper = RECIPES["double-head-ext-r50-fpn"]
    recipe = adapt(OWN, on_gpu(MANY), ())
    assert recipe.model.head == paper.model.head and recipe.model.backbone == paper.model.backbone
    assert replace(recipe.model.rpn, anchor_sizes=paper.model.rpn.anchor_sizes) == paper.model.rpn
    train = recipe.train
    assert (train.batch_size, train.lr, train.optimizer, train.amp) == (8, 0.01, "sgd", "bf16")
    assert train.steps == 12 * 118_000 // 8 and recipe.model.image.min_size == (800,)


def test_more_images_take_more_steps_and_few_are_not_learnt_by_heart():
    steps = [adapt(OWN, replace(CELLS, images=count), ()).train.steps for count in (5, 205, 1000, 100_000)]
    assert steps == [200, 480, 1000, 1920]
    passes = [adapt(OWN, replace(on_gpu(CELLS), images=n), ()).train.steps * 8 / n for n in (60, 205, 10_000)]
    assert passes == pytest.approx([100, 58.5, 12], abs=0.1)


def test_smaller_boxes_get_larger_images_and_smaller_anchors():
    large, small = (adapt(OWN, replace(CELLS, box_sides=[side]), ()).model for side in (0.3, 0.06))
    assert large.image.min_size < small.image.min_size == (256,)
    assert large.rpn.anchor_sizes[0] > small.rpn.anchor_sizes[0]
    assert 0.06 * 256 == pytest.approx(small.rpn.anchor_sizes[0], abs=0.5)


def test_what_the_user_set_stays():
    recipe = adapt(OWN, CELLS, ())
    wanted = {name for name, value in leaves(adapt(OWN, on_gpu(MANY), ())).items() if value != leaves(recipe)[name]}
    assert len(wanted) > 20
    for name in sorted(wanted):
        assert leaves(adapt(recipe, on_gpu(MANY), {name}))[name] == leaves(recipe)[name], name


def test_the_rules_follow_what_the_user_set():
    def train(**fields):
        own = replace(OWN, train=replace(OWN.train, **fields))
        return adapt(own, CELLS, {f"train.{name}" for name in fields}).train

    assert train(steps=1000).warmup_steps == 100 and train(steps=1000).eval_every == 200
    assert train(epochs=2.0).steps == 103
    assert train(batch_size=16).lr == 0.002 and train(batch_size=16).steps == 200  # as many images
    assert train(milestones=(300,)).schedule == "step" and train(milestones=(300,)).milestones == (300,)
    assert train(schedule="step").milestones == (320, 426)
    assert train(optimizer="sgd").lr == 0.005 and train(optimizer="sgd").weight_decay == TrainConfig().weight_decay


def test_a_kept_model_is_not_touched_and_learns_more_slowly():
    for name in ("bccd-small", "double-head-ext-r50-fpn"):
        start = replace(OWN, model=RECIPES[name].model)
        for facts in (CELLS, on_gpu(CELLS)):
            kept = adapt(start, facts, (), keep_model=True)
            assert kept.model == start.model
            fresh = {"adamw": 0.001, "sgd": 0.01}[kept.train.optimizer]
            assert kept.train.lr < fresh
            assert (kept.train.optimizer == "sgd") == (start.model.backbone.norm == "frozen_batch_norm")


def test_a_kept_model_of_too_small_images_gets_larger_ones():
    start = replace(OWN, model=RECIPES["shapes-ext"].model)  # 128 x 128 pixels: cells of 8 pixels
    kept = adapt(start, CELLS, (), keep_model=True).model
    assert (kept.image.min_size, kept.image.max_size) == ((192,), 256)
    assert replace(kept, image=start.model.image) == start.model
    assert adapt(start, CELLS, {"model.image.min_size", "model.image.max_size"}, keep_model=True).model == start.model


def test_it_says_what_it_chose():
    assert describe(adapt(OWN, CELLS, ()), CELLS) == (
        "images of 192 x 256 pixels at most, anchors from 21 to 330, 480 steps of 4 images (9.37 passes), adamw with "
        "rate 0.001"
    )


def test_processes_share_the_batch():
    assert adapt(OWN, replace(CELLS, processes=3), ()).train.batch_size == 6
    own = replace(OWN, train=replace(OWN.train, accumulate=2))
    assert adapt(own, replace(on_gpu(CELLS), processes=8), {"train.accumulate"}).train.batch_size == 16


def test_long_evaluations_are_rare():
    every = [adapt(OWN, replace(CELLS, validation_images=count), ()).train.eval_every for count in (0, 87, 400, 5000)]
    assert every == [96, 96, 240, 0]


def test_augmentation_grows_with_the_passes():
    few, more, many = (adapt(OWN, replace(CELLS, images=count), ()).train.augment for count in (20, 60, 1000))
    assert few.crop > more.crop == 0 and few.scale[1] > more.scale[1] > 1
    assert many == AugmentConfig()


class Annotated:
    """Two images with three boxes, one of them a crowd, and one without area."""

    classes = ["a", "b"]
    image_ids = [4, 9]
    image_sizes = [(100, 200), (50, 40)]

    def annotations(self):
        return [
            {"image_id": 4, "bbox": [0, 0, 10, 40], "iscrowd": 0},
            {"image_id": 9, "bbox": [0, 0, 10, 10], "iscrowd": 0},
            {"image_id": 9, "bbox": [0, 0, 40, 40], "iscrowd": 1},
            {"image_id": 9, "bbox": [0, 0, 0, 40], "iscrowd": 0},
        ]


def test_facts_of_a_data_set():
    facts = Facts.of(Annotated(), "cuda", processes=2, validation_images=7)
    assert facts == Facts(2, 2, [(100, 200), (50, 40)], [0.2, 0.25], "cuda", 2, 7)
    assert facts.short_side == 70 and facts.elongation == 1.25
