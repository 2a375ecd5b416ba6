"""LabelMe's JSON: kinds of shapes, groups, where the picture is, bad records."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageOps

from doublehead.config import DataConfig
from doublehead.data import DataError, DataWarning, build_dataset, open_splits
from tests.support.layouts import TRAIN, VAL, draw, labelme, write, write_layout

pytestmark = pytest.mark.filterwarnings("error::doublehead.data.DataWarning")  # only where a test expects one


def auto(root, **changes) -> DataConfig:
    return DataConfig(format="auto", root=str(root), val_split="all", **changes)


@pytest.fixture
def one(tmp_path):
    """A function that writes shapes for one picture, 64 x 48, and opens the set of it and an empty one."""
    root = tmp_path / "set"
    draw(root / "a0.jpg", TRAIN[0])
    draw(root / "b2.jpg", VAL[2])
    write(root / "b2.json", labelme(VAL[2]))

    def opened(*shapes, config=None, **changes):
        write(root / "a0.json", labelme(TRAIN[0]) | {"shapes": list(shapes)} | changes)
        return build_dataset(auto(root, **(config or {})), "val")

    opened.root = root
    return opened


def shape(kind, points, label="apple", **more):
    return {"label": label, "points": points, "shape_type": kind} | more


def test_kinds_of_shapes(one):
    data = one(
        shape("rectangle", [[30.5, 40], [10, 5.25]]),
        shape("polygon", [[1, 2], [9, 4], [5, 8]], "pear"),
        shape("circle", [[20, 20], [23, 24]]),
        shape("mask", [[3, 4], [9, 9]], mask="iVBOR"),
        shape("rotation", [[10, 0], [20, 10], [10, 20], [0, 10]]),
        shape(None, [[1, 2], [9, 4], [5, 8]]),
        shape("point", [[3, 4]]),
        shape("linestrip", [[3, 4], [9, 9]], "a line"),
    )
    assert data[0][1]["boxes"].tolist() == [
        [10, 5.25, 30.5, 40], [1, 2, 9, 8], [15, 15, 25, 25], [3, 4, 9, 9], [0, 0, 20, 20], [1, 2, 9, 8],
    ]  # fmt: skip
    assert data.classes == ["apple", "pear"] and data[0][1]["labels"].tolist() == [1, 2, 1, 1, 1, 1]
    assert data.unused == {"point or line": 2}


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 6])
def test_photographs_are_read_as_the_shapes_were_drawn(one, orientation):
    """Upright, unless the size says that the tool did not turn them."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    with Image.open(one.root / "a0.jpg") as image:
        image.save(one.root / "a0.jpg", exif=exif)
    with Image.open(one.root / "a0.jpg") as image:
        stored, shown = np.asarray(image), np.asarray(ImageOps.exif_transpose(image))
    for height, width in {shown.shape[:2], (None, None)}:
        data = one(shape("rectangle", [[3, 4], [9, 9]]), imageHeight=height, imageWidth=width)
        assert np.array_equal(data[0][0].permute(1, 2, 0).numpy(), shown)
        assert data.image_sizes[0] == shown.shape[:2]
    if orientation == 6:
        data = one(shape("rectangle", [[3, 4], [9, 9]]), imageHeight=48, imageWidth=64)
        assert np.array_equal(data[0][0].permute(1, 2, 0).numpy(), stored)


def test_the_parts_of_a_group_are_one_object(one):
    parts = [shape("rectangle", [[x, 5], [x + 4, 9]], group_id=1) for x in (2, 30)]
    data = one(*parts, shape("rectangle", [[0, 0], [5, 5]], "pear", group_id=1), shape("rectangle", [[0, 0], [7, 7]]))
    assert data[0][1]["boxes"].tolist() == [[2, 5, 34, 9], [0, 0, 5, 5], [0, 0, 7, 7]]
    assert [a["id"] for a in data.coco_ground_truth()["annotations"]] == [1, 2, 3]


def test_no_size_and_difficult(one):
    data = one(shape("rectangle", [[0, 0], [64, 48]], difficult=True), imageHeight=None, imageWidth=None)
    assert data.image_sizes[0] == (48, 64) and data.unused == {"crowd or difficult box": 1}


BOX = [[1, 1], [9, 9]]
BAD = {
    "one point": (shape("rectangle", [[1, 1]]), "malformed box", "a rectangle of 1 points; at least 2"),
    "two points": (shape("polygon", BOX), "malformed box", "a polygon of 2 points; at least 3"),
    "other kind": (shape("ellipse", BOX), "malformed box", "shape_type 'ellipse' with 2 points; circle, rectangle"),
    "kind 3": (shape(3, BOX), "malformed box", "shape_type"),
    "text": (shape("rectangle", [["a", 1], [2, 2]]), "malformed box", "points are"),
    "no points": ({"label": "apple", "shape_type": "rectangle"}, "malformed box", "points are None"),
    "nan": (shape("rectangle", [[float("nan"), 1], [2, 2]]), "non-finite box", "shape 1 of 2 (apple)"),
    "no label": (shape("rectangle", BOX, ""), "unknown category", "label '' is empty"),
    "label 3": (shape("rectangle", BOX, 3), "unknown category", "label 3 is empty"),
    "outside": (shape("rectangle", [[80, 1], [90, 9]]), "box outside the image", "64x48"),
    "no object": (7, "malformed record", "shape 1 of 2: is 7"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_shapes(one, case):
    bad, reason, said = BAD[case]
    with pytest.raises(DataError) as caught:
        one(bad, shape("rectangle", BOX))
    assert caught.value.reason == reason and said in str(caught.value) and str(one.root) in str(caught.value)
    with pytest.warns(DataWarning, match=f"left out 1 x {reason}"):
        data = one(bad, shape("rectangle", BOX), config={"on_bad_record": "skip"})
    assert data[0][1]["boxes"].tolist() == [[1, 1, 9, 9]]


@pytest.mark.parametrize("changes, reason, said", [
    ({"imageHeight": 40}, "wrong image size", "64x48"),
    ({"imageHeight": 0}, "malformed record", "imageHeight, imageWidth are 0, 64"),
    ({"imagePath": None}, "malformed record", "imagePath is None"),
    ({"shapes": None}, "invalid JSON", "no list 'shapes'"),
])  # fmt: skip
def test_bad_files(one, changes, reason, said):
    with pytest.raises(DataError) as caught:
        one(shape("rectangle", BOX), **changes)
    assert caught.value.reason == reason and said in str(caught.value)


@pytest.mark.parametrize("path", ["a0.jpg", "../images/a0.jpg", "..\\images\\a0.jpg", "C:\\me\\a0.jpg", "renamed.jpg"])
def test_the_picture_is_found(one, path):
    assert one(shape("rectangle", BOX), imagePath=path).file_names == ["a0.jpg", "b2.jpg"]


@pytest.mark.parametrize("path", ["../../secret.jpg", "/etc/secret.jpg", "..", "gone.jpg"])
def test_a_picture_elsewhere_is_refused(one, path):
    (one.root / "a0.jpg").rename(one.root.parent / "secret.jpg")
    with pytest.raises(DataError, match="has '..' in it|absolute path|no image 'gone.jpg' beside it"):
        one(shape("rectangle", BOX), imagePath=path)


def test_json_files_elsewhere_and_pictures_without_one(tmp_path):
    root = tmp_path / "set"
    for sample in TRAIN:
        draw(root / "images" / sample.file, sample)
        write(root / "annotations" / f"{sample.name}.json", labelme(sample) | {"imagePath": f"../images/{sample.file}"})
    (root / "annotations" / "a1.json").unlink()
    write(root / "annotations" / "settings.json", {"theme": "dark"})
    splits = open_splits(DataConfig(format="auto", root=str(root)))
    assert len(splits.train) + len(splits.val) == 4
    assert "1 x JSON file in annotations that is not LabelMe's: left out" in splits.said
    assert "1 x picture without a JSON file in images, such as a1: left out" in splits.said


def test_broken_files_are_bad_records(tmp_path):
    root = write_layout("labelme-splits", tmp_path)
    write(root / "val" / "b0.json", '{"version": "5", "shapes": [')
    config = DataConfig(format="auto", root=str(root), on_bad_record="skip")
    with pytest.warns(DataWarning, match="left out 1 x invalid JSON, first: .*b0.json"):
        assert len(build_dataset(config, "val")) == 2
