"""Which layers run in 8 bits: calibration images, and the search that measures every decision."""

import pytest
import torch

from doublehead.engine import quantizing
from doublehead.engine.quantizing import NothingLeft, calibration_images, choose_layers
from doublehead.errors import DataError, UserError
from tests.support.engine_standin import MemoryDataset

COSTS = {"a": 0.001, "b": 0.02, "c": 0.0005, "d": 0.004, "e": 0.0}
"""What each layer in int8 takes off an AP of 0.5."""


class Searched:
    """A model whose AP is known; `switched` is every set of layers in float that was tried."""

    def __init__(self, monkeypatch, costs=COSTS, errors=None):
        self.costs, self.errors, self.switched, self.said = costs, errors or costs, [], []
        monkeypatch.setattr(quantizing.quantized, "use_int8", self.use_int8)

    def use_int8(self, model, scales, leave_out=()):
        self.switched.append(list(leave_out))

    def ap(self):
        return 0.5 - sum(cost for name, cost in self.costs.items() if name not in self.switched[-1])

    def search(self, most_loss):
        scales = dict.fromkeys(self.costs, 0.1)
        return choose_layers(None, scales, self.ap, lambda: dict(self.errors), 0.5, most_loss, self.said.append)


def test_nothing_is_left_out_where_nothing_hurts(monkeypatch):
    searched = Searched(monkeypatch)
    searched.errors = None  # not even asked for
    choice = searched.search(0.03)
    assert choice.left_out == [] and choice.int8 == choice.int8_all_layers == pytest.approx(0.4745)
    assert searched.switched == [[], []]


def test_the_layer_that_hurts_is_left_out(monkeypatch):
    searched = Searched(monkeypatch)
    choice = searched.search(0.006)
    (entry,) = choice.left_out
    assert entry.layer == "b" and entry.output_error == 0.02
    assert (entry.AP_before, entry.AP_after) == (choice.int8_all_layers, choice.int8)
    assert choice.int8 == pytest.approx(0.4945)
    assert searched.switched == [[], ["b"], ["b"]]  # the first candidate sufficed; at the end it is in place


def test_measuring_decides_and_not_the_error(monkeypatch):
    searched = Searched(monkeypatch, errors={"a": 0.9, "e": 0.8, "b": 0.7, "c": 0.2, "d": 0.1})
    choice = searched.search(0.0)
    assert searched.switched[:4] == [[], ["a"], ["e"], ["b"]]
    assert [entry.layer for entry in choice.left_out] == ["b", "a", "d", "c"]
    gains = [entry.AP_after - entry.AP_before for entry in choice.left_out]
    assert gains == pytest.approx([COSTS[name] for name in "badc"])
    assert choice.int8 == pytest.approx(0.5) and searched.switched[-1] == ["b", "a", "d", "c"]


def test_no_layer_is_left(monkeypatch):
    searched = Searched(monkeypatch, costs=dict.fromkeys("abc", 0.1))
    with pytest.raises(NothingLeft, match=r"loses more than 5 AP .*fp32 50.00, last 40.00.*nothing is written"):
        searched.search(0.05)


# ---------------------------------------------------------------------- calibration images


def dataset(count=10):
    return MemoryDataset([torch.full((3, 8, 8), i, dtype=torch.uint8) for i in range(count)], [])


def test_images_are_spread_over_the_split():
    images, names = calibration_images(dataset(), 4)
    assert [int(image[0, 0, 0]) for image in images] == [0, 2, 5, 7]
    assert names == ["7.png", "27.png", "57.png", "77.png"]
    assert len(calibration_images(dataset(), None)[0]) == 10 and len(calibration_images(dataset(), None, 3)[0]) == 3


def test_too_few_images_are_one_line():
    with pytest.raises(UserError, match="^--images is 11, and memory has 10: give at most 10$"):
        calibration_images(dataset(), 11)


def test_an_unreadable_image(monkeypatch):
    data = dataset()
    load = data.load

    def broken(index):
        if index in (2, 5):
            raise DataError(f"{index}.png: cannot be decoded")
        return load(index)

    data.load = broken
    with pytest.raises(DataError, match="^2.png"):
        calibration_images(data, 4)
    data.replace_unreadable = True  # data.on-bad-record skip
    assert [int(image[0, 0, 0]) for image in calibration_images(data, 4)[0]] == [0, 1, 3, 7]
    with pytest.raises(DataError):
        calibration_images(data, 10)
