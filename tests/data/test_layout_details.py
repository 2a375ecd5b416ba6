"""COCO files and VOC folders of several tools: where their images are, and names that lead elsewhere."""

from __future__ import annotations

import shutil

import pytest

from doublehead.config import DataConfig
from doublehead.data import DataError, build_dataset, find_layout, open_splits
from tests.support.layouts import CLASSES, TRAIN, VAL, coco, draw_all, write, write_layout, xml

pytestmark = pytest.mark.filterwarnings("error::doublehead.data.DataWarning")


def auto(root, **changes) -> DataConfig:
    return DataConfig(**{"format": "auto", "root": str(root)} | changes)


@pytest.mark.parametrize("prefix", [
    "images/", "images\\", ".\\images\\", "../../label-studio/data/media/upload/1/", "/data/upload/1/", "C:\\me\\", "",
])  # fmt: skip
def test_label_studio_s_paths(tmp_path, prefix):
    root = write_layout("coco-label-studio", tmp_path / "set")
    write(root / "result.json", coco(TRAIN + VAL, prefix))
    splits = open_splits(auto(root, background="keep"))
    assert len(splits.train) + len(splits.val) == 8 and splits.train.classes == list(CLASSES)


@pytest.mark.parametrize("prefix", ["../", "/tmp/", "..\\"])
def test_names_that_lead_out_are_refused(tmp_path, prefix):
    """Also where the file is there: only the end of such a name is looked up, within the root."""
    root = write_layout("coco-label-studio", tmp_path / "set")
    (root / "images" / "a0.jpg").rename(tmp_path / "a0.jpg")
    write(root / "result.json", coco(TRAIN[:1], prefix))
    with pytest.raises(DataError, match=r"absolute path|has '\.\.' in it"):
        build_dataset(auto(root, train_split="all"), "train")
    write(root / "result.json", coco(TRAIN[:1], "../" * 2 + "set/../"))
    with pytest.raises(DataError, match=r"has '\.\.' in it"):
        build_dataset(auto(root, train_split="all"), "train")


def test_a_single_name_that_leads_out_is_a_bad_record(tmp_path):
    root = write_layout("coco-flat", tmp_path / "set")
    content = coco(TRAIN)
    content["images"][0]["file_name"] = "../../a0.jpg"
    write(root / "annotations" / "instances_train.json", content)
    with pytest.raises(DataError, match=r"images\[0\]: file_name: '../../a0.jpg' has '\.\.' in it"):
        build_dataset(auto(root), "train")


def test_last_parts_that_are_not_unique_are_not_used(tmp_path):
    root = write_layout("coco-label-studio", tmp_path / "set")
    content = coco(TRAIN[:2], "/data/")
    content["images"][1]["file_name"] = "/more/a0.jpg"
    write(root / "result.json", content)
    with pytest.raises(DataError, match="absolute path"):
        build_dataset(auto(root, train_split="all"), "train")


def test_images_that_are_nowhere(tmp_path):
    root = write_layout("coco-flat", tmp_path)
    shutil.rmtree(root / "images")
    with pytest.raises(DataError, match=r"instances_train.json: none of its images, such as 'a0.jpg', is in "):
        build_dataset(auto(root), "train")


@pytest.mark.parametrize("place", ["images/{name}", "images", "{name}", "pictures", "images/{word}2017"])
def test_places_of_images(tmp_path, place):
    for name, word, samples in (("Train", "train", TRAIN), ("Validation", "val", VAL)):
        write(tmp_path / "annotations" / f"instances_{name}.json", coco(samples))
        draw_all(tmp_path / place.format(name=name, word=word), samples)
    splits = open_splits(auto(tmp_path))
    assert splits.said == "COCO: 5 Train, 3 Validation, 3 classes" and len(splits.val) == 3


def test_two_files_in_a_split_s_folder(tmp_path):
    root = write_layout("coco-roboflow", tmp_path)
    write(root / "train" / "more.json", coco(TRAIN))
    with pytest.raises(DataError, match="several COCO files, _annotations.coco.json and more.json; one is accepted"):
        find_layout(root)


def test_a_test_set_without_boxes_only_by_name(tmp_path):
    root = write_layout("coco", tmp_path, TRAIN, ())
    (root / "annotations" / "instances_val.json").unlink()
    write(root / "annotations" / "image_info_test.json", coco(VAL) | {"annotations": []})
    draw_all(root / "test", VAL)
    assert "one split: 20% held out" in open_splits(auto(root)).said
    assert len(build_dataset(auto(root, val_split="test"), "val")) == 3


def test_other_json_files_do_not_matter(tmp_path):
    root = write_layout("yolo-classes", tmp_path)
    write(root / "notes.json", {"categories": [{"id": 0, "name": "apple"}], "info": {"year": 2026}})
    assert find_layout(root).family == "yolo"


class TestVoc:
    def test_lists_of_paths_and_lists_of_classes(self, tmp_path):
        root = write_layout("voc", tmp_path)
        lists = root / "ImageSets" / "Main"
        write(lists / "apple_train.txt", "a0 1\n")
        write(root / "train.txt", "wrong\n")
        assert find_layout(root).splits.keys() == {"train", "val"}
        shutil.rmtree(root / "ImageSets")
        write(root / "train.txt", "".join(f"./JPEGImages/{s.file} ./Annotations/{s.name}.xml\n" for s in TRAIN))
        write(root / "val.txt", "".join(f"{s.file}\n" for s in VAL))
        assert open_splits(auto(root)).said == "VOC: 5 train, 3 val, 3 classes"
        write(root / "val.txt", "../../b0\n")
        with pytest.raises(DataError, match=r"val.txt, line 1: '../../b0' has '\.\.' in it"):
            build_dataset(auto(root), "val")

    def test_trainval_is_trained_on_where_there_is_no_train(self, tmp_path):
        root = write_layout("voc", tmp_path)
        lists = root / "ImageSets" / "Main"
        (lists / "train.txt").rename(lists / "trainval.txt")
        (lists / "val.txt").rename(lists / "test.txt")
        said = open_splits(auto(root)).said
        assert said == "VOC: 5 trainval, 3 test, 3 classes; test serves as validation"

    def test_nested_folders_and_pictures_without_xml(self, tmp_path):
        for split, samples in (("train", TRAIN), ("val", VAL)):
            draw_all(tmp_path / "images" / split, samples)
            for sample in samples[1:]:
                write(tmp_path / "annotations" / split / f"{sample.name}.xml", xml(sample))
        assert open_splits(auto(tmp_path)).said == (
            "VOC XML in split folders: 4 train, 2 val, 3 classes; 1 x image without an XML file in train, such as a0: "
            "left out; 1 x image without an XML file in val, such as b0: left out"
        )


def test_validation_images_that_are_trained_on_are_said(tmp_path):
    root = write_layout("yolo", tmp_path / "yolo")
    names = "names: [apple, banana, cherry]\n"
    for train, said in (("images/train", False), ("images", True), ("[images/train, images/val]", True)):
        write(root / "data.yaml", f"train: {train}\nval: images/val\n{names}")
        said_there = open_splits(auto(root, background="keep")).said
        assert said_there.endswith("; the validation images are trained on too") == said
    write(root / "data.yaml", f"train: images/train\nval: images/train\n{names}")
    assert open_splits(auto(root)).said.endswith("; the validation images are trained on too")
    root = write_layout("voc", tmp_path / "voc")
    write(root / "ImageSets" / "Main" / "train.txt", "a0\na1\nb0\n")
    for format in ("auto", "voc"):  # found, and asked for by name
        said = open_splits(auto(root, format=format)).said
        assert said.endswith("; 1 of 3 validation images are trained on too")
