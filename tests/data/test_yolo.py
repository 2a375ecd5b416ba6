"""YOLO's label files: lines, polygons, borders, orientations; data.yaml in its usual and in broken forms."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image, ImageOps

from doublehead.config import DataConfig
from doublehead.data import DataError, DataWarning, build_dataset, open_splits
from tests.support.layouts import TRAIN, VAL, draw, write, write_layout, yolo

pytestmark = pytest.mark.filterwarnings("error::doublehead.data.DataWarning")  # only where a test expects one


def auto(root, **changes) -> DataConfig:
    return DataConfig(format="auto", root=str(root), val_split="all", **changes)


@pytest.fixture
def one(tmp_path):
    """A function that writes the label file of one picture, 64 x 48, and opens the set of it and an empty one."""
    root = tmp_path / "set"
    draw(root / "images" / "a0.jpg", TRAIN[0])
    draw(root / "images" / "b2.jpg", VAL[2])
    write(root / "labels" / "b2.txt", "")
    write(root / "classes.txt", "apple\nbanana\n\n")

    def opened(text: str, **changes):
        write(root / "labels" / "a0.txt", text)
        return build_dataset(auto(root, **changes), "val")

    opened.root = root
    return opened


def test_lines(one):
    data = one("1 0.5 0.5 0.25 0.5\n\n0 0.5 0.25 1 .5  \n")
    assert data[0][1]["boxes"].tolist() == [[24, 12, 40, 36], [0, 0, 64, 24]]
    assert data[0][1]["labels"].tolist() == [2, 1] and data.category_ids == [0, 1]
    assert len(data[1][1]["boxes"]) == 0 and data.file_names == ["images/a0.jpg", "images/b2.jpg"]


def test_a_detector_s_classes_keep_the_files_numbers(one):
    """Its label is the class's place in its own list, the category id the number in the files; a new class is new."""
    one("1 0.5 0.5 0.25 0.5\n")
    data = build_dataset(auto(one.root), "val", classes=["banana", "pear", "apple"])
    assert data.category_ids == [1, 2, 0] and data[0][1]["labels"].tolist() == [1]


def test_polygons_and_turned_boxes_become_the_box_around_them(one):
    data = one("0 0.25 0.25 0.5 0.125 0.375 0.75\n1 0.5 0.25 0.75 0.5 0.5 0.75 0.25 0.5\n")
    assert data[0][1]["boxes"].tolist() == [[16, 6, 32, 36], [16, 12, 48, 36]]


def test_rounding_at_the_border_is_no_note_but_more_is(one):
    data = one("0 0.500001 0.5 1 1.000004\n")
    assert data[0][1]["boxes"].tolist() == [[pytest.approx(0, abs=1e-4), 0, 64, 48]] and data.clipped == 0
    Image.new("RGB", (4000, 10)).save(one.root / "images" / "a0.jpg")  # a millionth is not a thousandth of a pixel
    data = one("0 0.500008 0.5 1 1\n")
    assert data[0][1]["boxes"][0, 2] == 4000 and data.clipped == 0
    with pytest.warns(DataWarning, match="cut 1 x box"):
        data = one("0 0.1 0.5 0.3 0.5\n")
    assert data[0][1]["boxes"][0, 0] == 0 and data.clipped == 1


BAD_LINES = {
    "0 0.5 0.5 0.5": ("malformed box", "line 1: 4 numbers, 5 .class x y width height. or a polygon"),
    "0 0.5 0.5 0.5 0.5 0.9": ("malformed box", "a detector's result with scores"),
    "0 320 240 100 100": ("malformed box", "seems to be in pixels"),
    "0 a 0.5 0.5 0.5": ("malformed box", "'a' is not a number"),
    "apple 0.5 0.5 0.5 0.5": ("malformed box", "'apple' is not a number"),
    "0 0.5 0.5 -0.5 0.5": ("degenerate box", "width, height are -0.5, 0.5"),
    "0 nan 0.5 0.5 0.5": ("non-finite box", "line 1"),
    "2 0.5 0.5 0.5 0.5": ("unknown category", "class 2 has no name, those of 0 to 1 have one"),
    "0.5 0.5 0.5 0.5 0.5": ("unknown category", "class 0.5 has no name"),
    "nan 0.5 0.5 0.5 0.5": ("unknown category", "class nan has no name"),
    "0 1.6 0.5 0.1 0.1": ("box outside the image", "64x48"),
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_lines(one, line):
    reason, said = BAD_LINES[line]
    with pytest.raises(DataError, match=said) as caught:
        one(f"{line}\n1 0.5 0.5 0.25 0.5\n")
    assert caught.value.reason == reason and str(one.root / "labels" / "a0.txt") in str(caught.value)
    with pytest.warns(DataWarning, match=f"left out 1 x {reason}"):
        data = one(f"{line}\n1 0.5 0.5 0.25 0.5\n", on_bad_record="skip")
    assert data[0][1]["labels"].tolist() == [2]


def test_label_files_that_are_no_text_or_missing(one):
    (one.root / "labels" / "b2.txt").write_bytes(b"\xff\xfe0")
    with pytest.raises(DataError, match="b2.txt: not a text file in UTF-8"):
        one("0 0.5 0.5 0.5 0.5\n")
    (one.root / "labels" / "b2.txt").unlink()
    one("0 0.5 0.5 0.5 0.5\n")
    draw(one.root / "images" / "b1.jpg", VAL[1])
    splits = open_splits(DataConfig(format="auto", root=str(one.root), background="keep"))
    assert "2 x image without a label file, such as images/b1.jpg: counted as empty" in splits.said


def test_shares_are_of_the_picture_as_shown(one):
    """A photograph turned by its EXIF orientation: labelling tools show it upright."""
    with Image.open(one.root / "images" / "a0.jpg") as image:
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(one.root / "images" / "a0.jpg", exif=exif)
    data = one("0 0.5 0.5 1 0.5\n")
    assert data.image_sizes[0] == (64, 48) and data[0][1]["boxes"].tolist() == [[0, 16, 48, 48]]
    assert data[0][0].shape == (3, 64, 48)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_read_as_their_labels_were_drawn(one, orientation):
    """Also where the size does not tell: turned by half, mirrored, square, without objects."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name, size in (("a0", (64, 48)), ("b2", (64, 48)), ("c0", (48, 48))):
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8))
        picture.resize(size).save(one.root / "images" / f"{name}.jpg", exif=exif)
    write(one.root / "labels" / "c0.txt", "0 0.25 0.25 0.5 0.5\n")
    data = one("0 0.5 0.5 1 0.5\n")
    for index in range(3):
        with Image.open(data.paths[index]) as image:
            shown = np.asarray(ImageOps.exif_transpose(image))
        assert data.image_sizes[index] == shown.shape[:2]
        assert np.array_equal(data[index][0].permute(1, 2, 0).numpy(), shown)


def test_a_pose_set_has_key_points_after_the_box(tmp_path):
    root = write_layout("yolo", tmp_path)
    write(
        root / "data.yaml", "train: images/train\nval: images/val\nkpt_shape: [1, 2]\nnames: [apple, banana, cherry]\n"
    )
    for sample in VAL:
        write(root / "labels" / "val" / f"{sample.name}.txt", yolo(sample).replace("\n", " 30 20\n"))
    assert build_dataset(DataConfig(format="auto", root=str(root)), "val")[0][1]["labels"].tolist() == [1, 3]


NAMES = "names: [apple, banana, cherry]\n"
GOOD = {
    "relative": "train: images/train\nval: images/val\n",
    "Roboflow's": "train: ../images/train\nval: ../images/val\n",
    "Windows": "train: ..\\images\\train\nval: .\\images\\val\n",
    "path": "path: /home/me/datasets/fruit\ntrain: images/train\nval: images/val\n",
    "path inside": "path: .\ntrain: images/train\nval: images/val\n",
    "absolute": "train: /content/fruit/images/train\nval: C:\\fruit\\images\\val\n",
    "lists": "train: [images/train]\nval: [images/val]\n",
    "labelled valid": "train: images/train\nvalid: images/val\n",
}


@pytest.mark.parametrize("case", GOOD)
def test_paths_that_lead_to_the_images(tmp_path, case):
    root = write_layout("yolo", tmp_path)
    write(root / "data.yaml", GOOD[case] + NAMES)
    assert (
        open_splits(DataConfig(format="auto", root=str(root))).said == "YOLO with data.yaml: 5 train, 3 val, 3 classes"
    )


def test_lists_of_images(tmp_path):
    root = write_layout("yolo", tmp_path)
    for split, samples in (("train", TRAIN), ("val", VAL)):
        write(root / f"{split}.txt", "".join(f"/data/fruit/images/{split}/{sample.file}\n" for sample in samples))
    write(root / "data.yaml", f"train: train.txt\nval: val.txt\n{NAMES}")
    data = build_dataset(DataConfig(format="auto", root=str(root)), "val")
    assert len(data) == 3 and data[0][1]["labels"].tolist() == [1, 3]
    write(root / "val.txt", "../../etc/passwd.jpg\n")
    with pytest.raises(DataError, match="val.txt, line 1: '../../etc/passwd.jpg' has '..' in it.*--data.outside-root"):
        build_dataset(DataConfig(format="auto", root=str(root)), "val")


def test_places_that_are_not_as_said_are_said(tmp_path):
    root = write_layout("yolo", tmp_path)
    write(root / "data.yaml", f"train: somewhere/else\nval: images/val\ntest: images/test\n{NAMES}")
    said = open_splits(DataConfig(format="auto", root=str(root))).said
    assert "data.yaml: train somewhere/else is read from images/train" in said
    assert "data.yaml: test images/test is not there" in said


BAD_YAML = {
    "names: [a\n": "data.yaml: invalid YAML",
    f"nc: 4\ntrain: images/train\nval: images/val\n{NAMES}": "nc is 4, but there are 3 names",
    "train: images/train\nnames: apple\n": "names is 'apple'; a list of names, or 'number: name' is accepted",
    "train: images/train\nnames: []\n": "data.yaml: no classes",
    "train: images/train\nnames: [a, a, b]\n": "the class 'a' occurs a second time",
    "train: images/train\nnames: {0: a, b: 1}\n": "names is",
    "train: images/train\nnames: [a, [b], c]\n": "names is",
    f"train: 3\n{NAMES}": "train is 3; a path or a list of paths is accepted",
    f"{NAMES}": "it names neither train nor val",
    "train: !!python/object/apply:os.system [id]\nnames: [a]\n": "invalid YAML",
}


@pytest.mark.parametrize("text", BAD_YAML)
def test_bad_descriptions(tmp_path, text):
    root = write_layout("yolo", tmp_path)
    write(root / "data.yaml", text)
    with pytest.raises(DataError, match="data.yaml") as caught:
        open_splits(DataConfig(format="auto", root=str(root)))
    assert BAD_YAML[text] in str(caught.value) and "\n" not in str(caught.value)


def test_images_that_are_not_there(tmp_path):
    root = write_layout("yolo", tmp_path)
    shutil.rmtree(root / "images" / "train")
    with pytest.raises(DataError, match=r"data.yaml: the images are not in .* \(train: images/train\)"):
        open_splits(DataConfig(format="auto", root=str(root)))
    shutil.rmtree(root / "labels")
    write_layout("yolo", root)
    shutil.rmtree(root / "labels" / "train")
    with pytest.raises(DataError, match="none of 5 images has a label file; that of a0.jpg would be .*labels/train/a0"):
        open_splits(DataConfig(format="auto", root=str(root)))


def test_labels_without_names(one):
    (one.root / "classes.txt").unlink()
    with pytest.raises(DataError, match="label files without the classes' names: write these into .*classes.txt"):
        one("0 0.5 0.5 0.5 0.5\n")


@pytest.mark.parametrize("form", ["labelImg", "darknet", "split folders", "labels beside in split folders"])
def test_other_places_of_labels(tmp_path, form):
    root = write_layout("yolo-classes", tmp_path / "set")
    names = root / "classes.txt"
    if form == "labelImg":
        for path in [*(root / "images").iterdir(), *(root / "labels").iterdir()]:
            path.rename(root / path.name)
    elif form == "darknet":
        names.rename(root / "obj.names")
        (root / "images").rename(root / "obj_train_data")
        for path in (root / "labels").iterdir():
            path.rename(root / "obj_train_data" / path.name)
    else:
        shutil.rmtree(root)
        write_layout("yolo-roboflow", root)
        (root / "data.yaml").unlink()
        write(names, "apple\nbanana\ncherry\n")
        if "beside" in form:
            for path in (root / "train" / "labels").iterdir():
                path.rename(root / "train" / "images" / path.name)
    config = DataConfig(format="auto", root=str(root), background="keep")
    splits = open_splits(config)
    assert len(splits.train) + len(splits.val) == 8 and splits.said.startswith("YOLO with ")
    labels = sorted(label for data in (splits.train, splits.val) for _, t in data for label in t["labels"].tolist())
    assert labels == sorted([1, 2, 3, 2, 1, 3, 3, 1, 1, 3, 2])
