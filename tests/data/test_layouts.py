"""One small set in every layout, found and read by its folder alone."""

from __future__ import annotations

import json
import os

import pytest
import torch

from doublehead.config import DataConfig
from doublehead.data import DataError, DataWarning, DetectionDataset, build_dataset, find_layout, open_splits
from tests.support.layouts import CLASSES, LAYOUTS, SINGLE, TRAIN, VAL, Sample, coco, write, write_layout

pytestmark = pytest.mark.filterwarnings("error::doublehead.data.DataWarning")  # only where a test expects one

TITLES = {
    "coco": "COCO: 5 train, 3 val, 3 classes",
    "coco-flat": "COCO: 5 train, 3 val, 3 classes",
    "coco-annotations": "COCO: 5 train, 3 val, 3 classes",
    "coco-roboflow": "COCO, Roboflow export: 5 train, 3 valid, 3 classes; category 0, 'fruit', has no boxes: dropped",
    "coco-cvat": "COCO, CVAT export: ",
    "coco-label-studio": "COCO, Label Studio export: ",
    "voc": "VOC: 5 train, 3 val, 3 classes",
    "voc-lists-at-root": "VOC: 5 train, 3 val, 3 classes",
    "voc-without-lists": "VOC without lists: ",
    "xml-beside": "VOC XML beside the images: ",
    "xml-folders": "VOC XML: ",
    "xml-roboflow": "VOC XML beside the images: 5 train, 3 valid, 3 classes",
    "yolo": "YOLO with data.yaml: 5 train, 3 val, 3 classes",
    "yolo-roboflow": "YOLO with data.yaml: 5 train, 3 val, 3 classes",
    "yolo-classes": "YOLO with classes.txt: ",
    "labelme": "LabelMe: ",
    "labelme-splits": "LabelMe: 5 train, 3 val, 3 classes",
}


def auto(root, **changes) -> DataConfig:
    return DataConfig(format="auto", root=str(root), **changes)


def contents(data: DetectionDataset) -> dict[str, list[tuple[str, list[float]]]]:
    """Picture -> its objects' classes and boxes to the accuracy of YOLO's six decimals."""
    found = {}
    for i, name in enumerate(data.file_names):
        target = data[i][1]
        labels = [data.classes[label - 1] for label in target["labels"].tolist()]
        boxes = [[round(value, 3) + 0.0 for value in box] for box in target["boxes"].tolist()]
        found[name.replace("\\", "/").rpartition("/")[2]] = list(zip(labels, boxes, strict=True))
    return found


def drawn(samples: tuple[Sample, ...]) -> dict[str, list[tuple[str, list[float]]]]:
    return {s.file: [(name, [float(value) for value in box]) for name, box in s.objects] for s in samples}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_set(tmp_path, name):
    splits = open_splits(auto(write_layout(name, tmp_path / "set"), background="keep"))
    assert splits.train.classes == splits.val.classes == list(CLASSES)
    if name in SINGLE:
        both = contents(splits.train) | contents(splits.val)
        assert both == drawn(TRAIN + VAL) and len(splits.val) == 2 and len(splits.train) == 6
        assert splits.said == f"{TITLES[name]}6 train, 2 val, 3 classes; one split: 20% held out by seed 0"
    else:
        assert contents(splits.train) == drawn(TRAIN) and contents(splits.val) == drawn(VAL)
        assert splits.said == TITLES[name]
    family = find_layout(tmp_path / "set").family
    assert splits.train.is_voc is splits.val.is_voc is (family == "voc")
    alone = DataConfig(format=family, root=str(tmp_path / "set"), background="keep")
    for split, dataset in (("train", splits.train), ("val", splits.val)):
        assert contents(build_dataset(alone, split)) == contents(dataset)


def test_layouts_have_a_title_and_images_load(tmp_path):
    assert TITLES.keys() == LAYOUTS.keys()
    data = build_dataset(auto(write_layout("labelme", tmp_path)), "val")
    image, target = data[0]
    x1, y1, x2, y2 = target["boxes"][0].int().tolist() if len(target["boxes"]) else (0, 0, 1, 1)
    assert image.shape[1:] == data.image_sizes[0] and image[:, y1:y2, x1:x2].dtype == torch.uint8


class TestDivision:
    """One split alone: by the names of the pictures and the seed, whatever else."""

    def names(self, root, split="val", **changes):
        return sorted(build_dataset(auto(root, background="keep", **changes), split).file_names)

    def test_it_is_the_same_everywhere(self, tmp_path, monkeypatch):
        root = write_layout("labelme", tmp_path)
        assert self.names(root) == ["a0.jpg", "a4.jpg"], "the draw has changed: stored runs validate on other images"
        listdir = os.scandir

        def reversed_scandir(path):
            with listdir(path) as entries:
                return Entries(reversed(list(entries)))

        monkeypatch.setattr(os, "scandir", reversed_scandir)
        assert self.names(root) == ["a0.jpg", "a4.jpg"]

    def test_it_does_not_depend_on_limits_or_the_layout(self, tmp_path):
        root = write_layout("labelme", tmp_path / "a")
        assert self.names(root, train_images=2, val_images=1)[0] in self.names(root)
        assert set(self.names(root, "train", train_images=2)) < set(self.names(root, "train"))
        assert self.names(root) == self.names(write_layout("xml-folders", tmp_path / "b"))

    def test_seed_and_share(self, tmp_path):
        root = write_layout("labelme", tmp_path)
        assert len({tuple(self.names(root, split_seed=seed)) for seed in range(6)}) > 2
        for share, count in ((0.01, 1), (0.5, 4), (0.99, 7)):
            val, train = self.names(root, val_share=share), self.names(root, "train", val_share=share)
            assert len(val) == count and sorted(val + train) == sorted(s.file for s in TRAIN + VAL)

    def test_the_whole_split_by_name(self, tmp_path):
        root = write_layout("coco-cvat", tmp_path)
        assert len(self.names(root, val_split="all")) == len(self.names(root, val_split="default")) == 8

    def test_training_on_everything_is_said(self, tmp_path):
        root = write_layout("coco-cvat", tmp_path)
        said = open_splits(auto(root, train_split="all")).said
        assert "one split: 20% held out" not in said or said.endswith("; the validation images are trained on too")
        assert open_splits(auto(root, train_split="all", val_split="all")).said.endswith("are trained on too")

    def test_copies_of_one_picture_stay_together(self, tmp_path):
        names = [f"{i}_jpg.rf.{copy * 32}.jpg" for i in range(6) for copy in "ab"]
        samples = [Sample(name[:-4], 20, 20, (("apple", (1, 1, 9, 9)),)) for name in names]
        held = self.names(write_layout("xml-beside", tmp_path, samples, ()), val_share=0.4)
        assert len(held) == 4 and len({name.split("_")[0] for name in held}) == 2

    def test_a_single_picture_is_an_error(self, tmp_path):
        with pytest.raises(DataError, match="a single picture cannot be divided"):
            build_dataset(auto(write_layout("labelme", tmp_path, TRAIN[:1], ())), "train")


class Entries:
    """What `os.scandir` returns."""

    def __init__(self, entries):
        self.entries = entries

    def __enter__(self):
        return self.entries

    def __exit__(self, *error):
        pass


class TestSplits:
    def test_test_serves_as_validation(self, tmp_path):
        root = write_layout("xml-roboflow", tmp_path)
        (root / "valid").rename(root / "test")
        splits = open_splits(auto(root))
        assert splits.said == ("VOC XML beside the images: 5 train, 3 test, 3 classes; test serves as validation")
        assert contents(splits.val) == drawn(VAL)

    def test_train_alone_is_divided(self, tmp_path):
        write_layout("coco-roboflow", tmp_path, TRAIN + VAL, ())
        (tmp_path / "valid" / "_annotations.coco.json").unlink()
        splits = open_splits(auto(tmp_path, background="keep"))
        assert "6 train, 2 val, 3 classes; one split: 20% held out by seed 0" in splits.said

    def test_validation_alone_is_evaluated_but_not_trained_on(self, tmp_path):
        root = write_layout("coco-roboflow", tmp_path)
        (root / "train" / "_annotations.coco.json").unlink()
        assert contents(build_dataset(auto(root), "val")) == drawn(VAL)
        with pytest.raises(DataError, match="no split to train on; there is valid: name one with --data.train-split"):
            build_dataset(auto(root), "train")

    def test_names_are_taken_as_given(self, tmp_path):
        root = write_layout("coco-flat", tmp_path)
        assert contents(build_dataset(auto(root, val_split="train"), "val")) == drawn(TRAIN)
        with pytest.raises(DataError, match=r"no split 'tset' \(--data.val-split\); there is train, val"):
            build_dataset(auto(root, val_split="tset"), "val")

    def test_several_that_could_be_meant_are_an_error(self, tmp_path):
        root = write_layout("coco-flat", tmp_path)
        folder = root / "annotations"
        write(folder / "instances_train2014.json", coco(TRAIN))
        assert contents(build_dataset(auto(root), "train")) == drawn(TRAIN)  # the exact name
        (folder / "instances_train.json").rename(folder / "instances_train2017.json")
        with pytest.raises(DataError, match="several splits could be 'train': train2014, train2017; name one with"):
            build_dataset(auto(root), "train")
        assert contents(build_dataset(auto(root, train_split="train2014"), "train")) == drawn(TRAIN)

    def test_a_second_kind_of_annotations_is_said(self, tmp_path):
        root = write_layout("xml-beside", write_layout("labelme", tmp_path))
        assert open_splits(auto(root)).said.endswith("; LabelMe lies there too, --data.format labelme reads it")
        assert "LabelMe: " in open_splits(DataConfig(format="labelme", root=str(root))).said


class TestClasses:
    """`data.classes` selects and orders."""

    @pytest.mark.parametrize("name", ["coco", "coco-roboflow", "voc", "yolo", "labelme-splits"])
    def test_selected_in_order(self, tmp_path, name):
        root = write_layout(name, tmp_path)
        splits = open_splits(auto(root, classes=("cherry", "apple")))
        whole = build_dataset(auto(root), "train")
        assert splits.train.classes == splits.val.classes == ["cherry", "apple"]
        ids = dict(zip(whole.classes, whole.category_ids, strict=True))
        assert splits.train.category_ids == [ids["cherry"], ids["apple"]]
        wanted = {file: [item for item in items if item[0] != "banana"] for file, items in drawn(TRAIN).items()}
        assert contents(splits.train) == {file: items for file, items in wanted.items() if items}
        assert splits.train.unused == {"object of another class (data.classes)": 2, "image without boxes": 1}
        assert len(splits.val) == 3 and splits.val.unused == {"object of another class (data.classes)": 1}
        kept = build_dataset(auto(root, classes=("cherry", "apple"), background="keep"), "train")
        assert len(kept) == len(TRAIN)

    def test_unknown_names(self, tmp_path):
        root = write_layout("coco", tmp_path)
        for said, near in (("Cherry", "cherry"), ("bananna", "banana")):
            with pytest.raises(DataError, match=f"no class '{said}': did you mean '{near}'.; theirs are apple, ban"):
                open_splits(auto(root, classes=("apple", said)))
        with pytest.raises(DataError, match="no class 'tractor'; theirs are apple"):
            open_splits(auto(root, classes=("tractor",)))

    @pytest.mark.parametrize("classes", [(), ("apple", "apple"), ("apple", " ")])
    def test_no_or_repeated_or_empty_names(self, tmp_path, classes):
        root = write_layout("coco", tmp_path)
        with pytest.raises(DataError, match="data.classes: "):
            build_dataset(auto(root, classes=classes), "train")

    def test_a_split_that_loses_everything_is_an_error(self, tmp_path):
        one = Sample("only", 20, 20, (("apple", (1, 1, 9, 9)),))
        root = write_layout("coco", tmp_path, TRAIN, [one])
        with pytest.raises(DataError, match=r"no object of the chosen classes is left.*1 x object of another class"):
            build_dataset(auto(root, classes=("cherry",)), "val")
        root = write_layout("voc", tmp_path / "voc", [one], TRAIN)
        with pytest.raises(DataError, match=r"no image with a box is left; not used: .*1 x object of another class"):
            build_dataset(auto(root, classes=("cherry",)), "train")

    def test_a_detector_s_classes(self, tmp_path):
        """Its order counts; another class is a bad record, but left out where `data.classes` says so."""
        root = write_layout("voc", tmp_path)
        config = auto(root, classes=("apple", "cherry"))
        data = build_dataset(config, "val", classes=["cherry", "apple"])
        assert data.classes == ["cherry", "apple"] and data.category_ids == [3, 1]
        assert contents(data)["b0.jpg"] == drawn(VAL)["b0.jpg"] and contents(data)["b1.jpg"] == []
        with pytest.raises(DataError, match="class 'banana' is not among the classes"):
            build_dataset(auto(root), "val", classes=["cherry", "apple"])


def test_classes_that_differ_in_case_alone_are_said(tmp_path):
    more = Sample("c0", 20, 20, (("Apple", (1, 1, 9, 9)),))
    root = write_layout("voc", tmp_path, (*TRAIN, more), VAL)
    assert open_splits(auto(root)).said.endswith("classes 'Apple' and 'apple' differ in case or spaces alone")


@pytest.mark.parametrize("name, file", [
    ("labelme", "a0.json"), ("xml-beside", "a0.xml"), ("yolo", "labels/train/a0.txt"), ("coco-cvat", "result.json"),
    ("voc-lists-at-root", "train.txt"), ("coco-annotations", "annotations/train.json"), ("yolo", "data.yaml"),
])  # fmt: skip
def test_pipes_are_not_waited_for(tmp_path, name, file):
    root = write_layout(name, tmp_path)
    (root / file).unlink(missing_ok=True)
    os.mkfifo(root / file)
    try:
        open_splits(auto(root))
    except DataError as error:
        assert "\n" not in str(error)


def test_placeholder_that_is_used_stays(tmp_path):
    root = write_layout("coco-roboflow", tmp_path)
    content = json.loads((root / "valid" / "_annotations.coco.json").read_text())
    content["annotations"][0]["category_id"] = 0
    write(root / "valid" / "_annotations.coco.json", content)
    splits = open_splits(auto(root))
    assert splits.train.classes == ["fruit", *CLASSES] and "dropped" not in splits.said


def test_policies_hold(tmp_path):
    """Bad records of the new formats are counted as those of the others."""
    root = write_layout("yolo-roboflow", tmp_path)
    (root / "train" / "labels" / "a1.txt").write_text("2 0.5 0.5 0.5\n")
    with pytest.raises(DataError, match="a1.txt, line 1: 4 numbers, 5 .*on-bad-record skip"):
        build_dataset(auto(root), "train")
    with pytest.warns(DataWarning, match="left out 1 x malformed box, first: .*a1.txt"):
        data = build_dataset(auto(root, on_bad_record="skip"), "train")
    assert data.skipped == {"malformed box": 1} and len(data) == 4
