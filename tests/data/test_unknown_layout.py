"""A folder in no known layout: one line names what lies there, what it resembles, and what is accepted."""

from __future__ import annotations

import shutil

import pytest

from doublehead.config import DataConfig
from doublehead.data import DataError, build_dataset, find_layout
from tests.support.layouts import TRAIN, coco, draw_all, write, write_layout


def empty(root):
    root.mkdir()
    return "There: nothing. Accepted: COCO ("


def one_folder_too_high(root):
    write_layout("voc", root / "VOCdevkit" / "VOC2007")
    return f"one folder further in: give {root / 'VOCdevkit' / 'VOC2007'}. "


def several(root):
    write_layout("coco", root / "one")
    write_layout("labelme", root / "two")
    return f"There are several data sets in it: give one, such as {root / 'one'}. "


def records(root):
    write(root / "train" / "cells.tfrecord", "")
    return "There: train/. train/cells.tfrecord is TensorFlow's records: export the set as COCO JSON"


def table(root):
    draw_all(root / "train", TRAIN)
    write(root / "train" / "_annotations.csv", "")
    return "train/_annotations.csv is a table"


def archive(root):
    write(root / "set.zip", "")
    return "set.zip is an archive: unpack it"


def pictures_alone(root):
    draw_all(root / "images", TRAIN)
    return "It has pictures without annotations: label them"


def no_pictures(root):
    write_layout("yolo-classes", root)
    shutil.rmtree(root / "images")
    return "It has no pictures"


def json_in_the_wrong_place(root):
    draw_all(root / "images", TRAIN)
    write(root / "meta" / "boxes.json", coco(TRAIN))
    return "meta/boxes.json seems to be COCO's: move it into"


def other_tool_s_json(root):
    draw_all(root, TRAIN)
    write(root / "via.json", {"_via_img_metadata": {}})
    return "seems to be a project of the VGG Image Annotator"


def label_studio_s_own_json(root):
    write(root / "project.json", [{"data": {}, "annotations": []}])
    return "an export of Label Studio in its own format"


def broken_json(root):
    draw_all(root / "images", TRAIN)
    write(root / "annotations" / "train.json", "{oops")
    return "train.json: invalid JSON: "


def cvat_s_own_xml(root):
    draw_all(root / "images", TRAIN)
    write(root / "annotations.xml", "<annotations><version>1.1</version></annotations>")
    return "annotations.xml holds all images in one, as CVAT's own XML does"


CASES = [empty, one_folder_too_high, several, records, table, archive, pictures_alone, no_pictures,
         json_in_the_wrong_place, other_tool_s_json, label_studio_s_own_json, broken_json, cvat_s_own_xml]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_it_resembles(tmp_path, case):
    root = tmp_path / "set"
    said = case(root)
    with pytest.raises(DataError) as caught:
        build_dataset(DataConfig(format="auto", root=str(root)), "train")
    text = str(caught.value)
    assert text.startswith(f"{root}: not in a layout that is known. There: ") and said in text and "\n" not in text
    assert all(f"{name} (" in text.partition("Accepted: ")[2] for name in ("COCO", "Pascal VOC", "YOLO", "LabelMe"))


@pytest.mark.parametrize("inner", ["images", "labels", "images/train"])
def test_one_folder_too_deep(tmp_path, inner):
    root = write_layout("yolo", tmp_path / "set")
    with pytest.raises(DataError, match=f"It is a part of a data set: give {root}. "):
        find_layout(root / inner)


def test_a_format_that_is_not_there(tmp_path):
    root = write_layout("labelme", tmp_path / "set")
    with pytest.raises(DataError, match="not in a layout that is known.*LabelMe lies there, --data.format labelme"):
        build_dataset(DataConfig(format="yolo", root=str(root)), "train")


def test_no_folder(tmp_path):
    write_layout("labelme", tmp_path / "cells")
    write(tmp_path / "cells.zip", "")
    for name, said in (
        ("cels", f"no such folder .data.root.; {tmp_path / 'cells'} is there"),
        ("cells.zip", "a file, not a folder .data.root.; an archive: unpack it, and give the folder"),
        ("cells/a0.json", f"a file, not a folder .data.root.; give the data set's folder, such as {tmp_path}/cells"),
    ):
        for open_it in (find_layout, lambda root: build_dataset(DataConfig(format="auto", root=str(root)), "val")):
            with pytest.raises(DataError, match=said):
                open_it(tmp_path / name)
