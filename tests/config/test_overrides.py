"""Changes of a configuration from Python, and what is said of those that cannot be meant."""

from pathlib import Path

import numpy as np
import pytest
import torch

from doublehead.config import AugmentConfig, DataConfig, Recipe, TrainConfig, override


def test_nested_fields_are_changed_and_named():
    base = Recipe("a", train=TrainConfig(lr=0.5))
    changed, given = override(base, {"train": {"steps": 7, "augment": {"crop": 0.5}}, "data": {"root": "cells"}})
    assert changed == Recipe(
        "a", train=TrainConfig(lr=0.5, steps=7, augment=AugmentConfig(crop=0.5)), data=DataConfig(root="cells")
    )
    assert given == {"train.steps", "train.augment.crop", "data.root"}
    assert override(base, {}) == (base, frozenset())


def test_a_value_that_is_the_default_is_given_too():
    assert override(Recipe(), {"train": {"steps": TrainConfig().steps}})[1] == {"train.steps"}


def test_a_whole_configuration_gives_the_fields_that_differ():
    config = TrainConfig(steps=7, augment=AugmentConfig(crop=0.5))
    changed, given = override(Recipe(), {"train": config})
    assert changed.train == config and given == {"train.steps", "train.augment.crop"}


def test_values_of_python_serve():
    changes = {
        "data": {"root": Path("cells"), "classes": ["a", "b"]},
        "train": {
            "steps": np.int64(4),
            "lr": np.float32(0.5),
            "device": torch.device("cpu"),
            "milestones": (np.int32(3),),
        },
    }
    changed = override(Recipe(), changes)[0]
    assert (changed.data.root, changed.data.classes) == ("cells", ("a", "b"))
    assert (changed.train.steps, changed.train.lr, changed.train.device) == (4, 0.5, "cpu")
    assert changed.train.milestones == (3,) and type(changed.train.milestones[0]) is int


@pytest.mark.parametrize("changes, message", [
    ({"train": {"step": 4}}, r"there is no field train.step; did you mean train.steps\?"),
    ({"train": {"augment": {"crops": 1}}}, r"there is no field train.augment.crops; did you mean train.augment.crop\?"),
    ({"train": {"root": "a"}}, r"there is no field train.root; did you mean data.root\?"),
    ({"train": {"augment": {"zzz": 1}}}, "train.augment.zzz; the fields of train.augment are: scale, crop, colour"),
    ({"tran": {}}, r"there is no field tran; did you mean train\?"),
    ({3: {}}, "there is no field 3; the fields are: name, about, model, data, train"),
    ({"train": 200}, r"train is 200, a dictionary is accepted, such as train=\{'steps': 180000\}"),
    ({"train": {"augment": None}}, "train.augment is None, a dictionary is accepted"),
    ({"train": {"steps": "200"}}, "train.steps is '200', a whole number of at least 1 is accepted"),
    ({"train": {"steps": None}}, "train.steps is None, a whole number"),
    ({"train": {"lr": float("nan")}}, "train.lr is nan, a finite number"),
    ({"model": {"head": {"kind": "double"}}}, "model.head.kind is 'double', one of fc, conv"),
    ({"data": {"classes": "cat"}}, "data.classes is 'cat', a list"),
])  # fmt: skip
def test_what_cannot_be_meant_is_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        override(Recipe(), changes)
    assert "\n" not in str(error.value)
