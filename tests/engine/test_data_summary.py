"""Choice of pictures for a data set's sheet, and pictures that occur more than once."""

import numpy as np
import pytest

from doublehead.engine.data_sheet import choose_evenly
from doublehead.engine.repeated import find_repeated


def test_every_class_has_its_turn():
    presence = np.zeros((300, 20), bool)
    presence[:, 0] = True  # one is everywhere
    presence[np.arange(1, 20), np.arange(1, 20)] = True  # each of the others in one picture
    chosen = choose_evenly(presence, 20)
    assert len(set(chosen)) == 20 and presence[chosen].any(axis=0).all()


@pytest.mark.parametrize("images, classes, number, length", [(5, 3, 16, 5), (1, 1, 16, 1), (4, 0, 3, 3), (0, 2, 3, 0)])
def test_few_images(images, classes, number, length):
    presence = np.zeros((images, classes), bool)
    presence[:2, :1] = True
    chosen = choose_evenly(presence, number)
    assert len(set(chosen)) == len(chosen) == length
    assert set(chosen[:2]) <= {0, 1} or not classes  # images without any class come last


def test_pictures_that_occur_twice(tmp_path):
    def file(name, content):
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    middle = bytes(5000)
    train = [file("a", b"one"), file("b", b"two"), file("c", b"two"), file("d", middle + b"x" + middle)]
    val = [file("e", b"one"), file("f", b"six"), file("g", middle + b"y" + middle)]
    found = find_repeated({"train": train, "val": val})
    assert found.across == [(train[0], val[0])] and found.within == [("train", train[1], train[2])]
    assert found.named == []
    assert find_repeated({"val": val}).across == []


def test_names_that_are_in_both_splits(tmp_path):
    def file(name):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
        return str(path)

    train = [file(f"train/{name}") for name in ("a_jpg.rf.0123456789ab.jpg", "b.jpg", "c.png")]
    val = [file(f"val/{name}") for name in ("a_jpg.rf.ba9876543210.jpg", "b.jpg", "c.jpg")]
    assert find_repeated({"train": train, "val": val}).named == [(train[0], val[0]), (train[1], val[1])]
