"""Pascal VOC folders: the pixel convention, difficult objects, classes, every kind of bad record, and BCCD."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from doublehead.config import DataConfig
from doublehead.data import DataError, DataWarning, build_dataset
from doublehead.data.voc import VOC_CLASSES
from tests.support.data_samples import VocFolder, picture

pytestmark = pytest.mark.filterwarnings("error::doublehead.data.DataWarning")  # only where a test expects one


@pytest.fixture
def voc(tmp_path):
    return VocFolder(tmp_path / "set")


def test_contents(voc):
    voc.write()
    data = build_dataset(voc.config(), "val")
    assert data.classes == ["frog", "newt"] and data.category_ids == [1, 2]
    assert data.file_names == ["one.jpg", "two.jpg", "bare.jpg"] and data.image_ids == [1, 2, 3]
    assert data.image_sizes == [(30, 40)] * 3
    # 1-based and inclusive in the file, between pixel edges here; the difficult object is no target
    assert [data[i][1]["boxes"].tolist() for i in range(3)] == [[[0, 0, 40, 30]], [[10, 20, 30, 25]], []]
    assert [data[i][1]["labels"].tolist() for i in range(3)] == [[1], [2], []]
    train = build_dataset(voc.config(), "train")
    assert train.file_names == ["one.jpg", "two.jpg"]
    assert train.unused == {"image without boxes": 1, "crowd or difficult box": 1}


def test_ground_truth_keeps_difficult_objects_as_ignored(voc):
    voc.write()
    truth = build_dataset(voc.config(), "val").coco_ground_truth()["annotations"]
    keys = ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "ignore")
    assert [tuple(a[key] for key in keys) for a in truth] == [
        (1, 1, 1, [0, 0, 40, 30], 1200, 0, 0),
        (2, 1, 2, [4, 5, 3, 3], 9, 1, 1),
        (3, 2, 2, [10, 20, 20, 5], 100, 0, 0),
    ]


def test_pycocotools_neither_rewards_nor_punishes_difficult_objects(voc, capsys):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    voc.write()
    truth = COCO()
    truth.dataset = build_dataset(voc.config(), "val").coco_ground_truth()
    truth.createIndex()
    newt = {"image_id": 2, "category_id": 2, "bbox": [10, 20, 20, 5], "score": 0.5}
    frog = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 40, 30], "score": 0.5}
    hard = {"image_id": 1, "category_id": 2, "bbox": [4, 5, 3, 3], "score": 0.9}  # first in rank: would cost precision
    for found in ([newt, frog], [newt, frog, hard]):
        scores = COCOeval(truth, truth.loadRes(found), "bbox")
        scores.evaluate()
        scores.accumulate()
        scores.summarize()
        assert scores.stats[0] == pytest.approx(1.0)


def test_boxes_over_the_border_are_cut_and_told(voc):
    voc.objects["two"] = [("newt", (0, 0, 39, 29), 0), ("newt", (20, 20, 41, 33), 0)]  # counted from 0; too long
    voc.write()
    with pytest.warns(DataWarning, match=r"cut 2 x box.*object 1 of 2 \(newt\)"):
        data = build_dataset(voc.config(), "val")
    assert data[1][1]["boxes"].tolist() == [[0, 0, 39, 29], [19, 19, 40, 30]]
    assert data.clipped == 2 and not data.skipped
    assert [a["bbox"] for a in data.coco_ground_truth()["annotations"]][2:] == [[0, 0, 39, 29], [19, 19, 21, 11]]


def test_classes_are_those_of_all_annotations(voc):
    voc.write()
    voc.xml_file("elsewhere").write_text(voc.xml(voc.entry("axolotl", (1, 1, 2, 2))))  # in no list
    voc.xml_file("broken").write_text("<annotation>")
    for split in ("train", "val"):
        assert build_dataset(voc.config(), split).classes == ["axolotl", "frog", "newt"]  # not the part's 'head'
    data = build_dataset(voc.config(), "val", classes=["newt", "frog"])
    assert data.classes == ["newt", "frog"] and data[0][1]["labels"].tolist() == [2]


def test_of_the_twenty_classes_of_voc_those_that_occur(voc):
    voc.objects = {"one": [("person", (1, 1, 9, 9), 0)], "two": [("cat", (1, 1, 9, 9), 0)], "bare": []}
    voc.write()
    data = build_dataset(voc.config(), "val")
    assert data.classes == ["cat", "person"] and VOC_CLASSES == tuple(sorted(VOC_CLASSES)) and len(VOC_CLASSES) == 20
    assert [data[i][1]["labels"].tolist() for i in range(2)] == [[2], [1]]
    older = build_dataset(voc.config(), "val", classes=VOC_CLASSES)
    assert [older[i][1]["labels"].tolist() for i in range(2)] == [[15], [8]]


def test_limit_stops_before_bad_records(voc):
    voc.objects["two"] = [("newt", (5, 5, 4, 5), 0)]
    voc.write()
    assert build_dataset(voc.config(train_images=1), "train").file_names == ["one.jpg"]
    with pytest.raises(DataError):
        build_dataset(voc.config(train_images=2), "train")


def test_other_suffixes_and_blank_lines(voc):
    picture(voc.root / "JPEGImages" / "three.PNG")
    voc.objects["three"] = voc.objects["two"]
    voc.listed = ["\ufeff", "three ", "", "two"]
    voc.write()
    data = build_dataset(voc.config(), "val")
    assert data.file_names == ["three.PNG", "two.jpg"] and data.image_ids == [2, 4]


def test_no_size_in_the_annotation(voc):
    voc.write()
    voc.xml_file("two").write_text(voc.xml(voc.entry("newt", (11, 21, 30, 25)), size=""))
    assert build_dataset(voc.config(), "val").image_sizes == [(30, 40)] * 3


def rewrite(text: str):
    return lambda voc: voc.xml_file("two").write_text(text)


def one_object(text: str):
    return rewrite(VocFolder.xml(text))


def boxed(*box):
    return one_object(VocFolder.entry("newt", box))


def sized(size: str):
    return rewrite(VocFolder.xml(VocFolder.entry("newt", (11, 21, 30, 25)), size))


BAD_RECORDS = {
    # how to break image `two` or its only object, the reason, what the message says, is the image itself left out
    "missing image": (lambda v: (v.root / "JPEGImages/two.jpg").unlink(), "missing image", "val.txt, line 2", True),
    "missing annotation": (lambda v: v.xml_file("two").unlink(), "missing annotation file", "two.xml", True),
    "not an image": (lambda v: (v.root / "JPEGImages/two.jpg").write_text("x"), "unreadable image", "two.jpg", True),
    "not XML": (rewrite("<annotation><object>"), "invalid XML", "two.xml: invalid XML: no element found: line 1", True),
    "empty XML": (rewrite(""), "invalid XML", "two.xml", True),
    "unknown encoding": (rewrite('<?xml version="1.0" encoding="klingon"?><a/>'), "invalid XML", "two.xml", True),
    "wrong size": (sized("<size><width>30</width><height>40</height></size>"), "wrong image size", "30x40", True),
    "no height": (sized("<size><width>30</width></size>"), "malformed record", "two.xml, size", True),
    "turned to the left": (boxed(5, 5, 4, 9), "degenerate box", "object 1 of 1 (newt)", False),
    "turned round": (boxed(5, 9, 8, 5), "degenerate box", "xmin=5 ymin=9 xmax=8 ymax=5", False),
    "outside": (boxed(41, 5, 50, 9), "box outside the image", "40x30", False),
    "left of it": (boxed(-8, 5, 0, 9), "box outside the image", "object 1 of 1", False),
    "nan": (boxed(5, "nan", 8, 9), "non-finite box", "object 1 of 1", False),
    "inf": (boxed(5, 5, 8, "inf"), "non-finite box", "object 1 of 1", False),
    "text": (boxed(5, "five", 8, 9), "malformed box", "'five'", False),
    "three corners": (one_object("<object><name>newt</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax></bndbox>"
                                 "</object>"), "malformed box", "object 1 of 1", False),
    "no box": (one_object("<object><name>newt</name></object>"), "malformed box", "no bndbox", False),
    "no name": (one_object("<object><bndbox/></object>"), "unknown category", "name ''", False),
    "difficult 7": (one_object(VocFolder.entry("newt", (1, 1, 9, 9), 7)), "malformed record", "is '7'", False),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_bad_record_is_one_clear_error(voc, case):
    break_it, reason, said, _ = BAD_RECORDS[case]
    voc.write()
    break_it(voc)
    with pytest.raises(DataError) as caught:
        build_dataset(voc.config(), "val")
    assert caught.value.reason == reason and said in str(caught.value)
    assert str(caught.value).startswith(str(voc.root)) and "--data.on-bad-record skip" in str(caught.value)


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_bad_record_is_left_out_and_counted(voc, case):
    break_it, reason, said, whole_image = BAD_RECORDS[case]
    voc.write()
    break_it(voc)
    with pytest.warns(DataWarning) as caught:
        data = build_dataset(voc.config(on_bad_record="skip"), "val")
    assert len(caught) == 1 and f"1 x {reason}" in str(caught[0].message) and said in str(caught[0].message)
    assert data.skipped == {reason: 1}
    assert data.image_ids == ([1, 3] if whole_image else [1, 2, 3])
    assert len(data.coco_ground_truth()["annotations"]) == 2


def test_repeated_line_and_unknown_class(voc):
    voc.listed.append("one")
    voc.write()
    with pytest.raises(DataError, match="val.txt, line 4: 'one' occurs a second time"):
        build_dataset(voc.config(), "val")
    with pytest.warns(DataWarning):
        data = build_dataset(voc.config(on_bad_record="skip"), "val", classes=["newt"])
    assert data.skipped == {"duplicate image id": 1, "unknown category": 1}
    assert len(data) == 3


@pytest.mark.parametrize("mode", ["error", "skip"])
def test_missing_files_and_folders(voc, mode):
    voc.write()
    with pytest.raises(DataError, match="test.txt: no such file; splits there: train, val"):
        build_dataset(voc.config(val_split="test", on_bad_record=mode), "val")
    (voc.root / "ImageSets" / "Main" / "val.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not a text file"):
        build_dataset(voc.config(on_bad_record=mode), "val")
    (voc.root / "ImageSets" / "Main" / "val.txt").write_text("\n")
    with pytest.raises(DataError, match="no image is left"):
        build_dataset(voc.config(on_bad_record=mode), "val")
    (voc.root / "JPEGImages").rename(voc.root / "Pictures")
    with pytest.raises(DataError, match="JPEGImages: no such folder"):
        build_dataset(voc.config(on_bad_record=mode), "val")


def raw_objects(path: Path) -> list[tuple[str, list[int]]]:
    """Name and four corners of each object, by regular expressions: another reader than the one under test."""
    found = []
    for block in re.findall(r"<object>(.*?)</object>", path.read_text(), re.DOTALL):
        corners = [int(re.search(f"<{key}>(.*?)</{key}>", block)[1]) for key in ("xmin", "ymin", "xmax", "ymax")]
        found.append((re.search("<name>(.*?)</name>", block)[1], corners))
    return found


WITHOUT_AREA = {
    "train": ("BloodImage_00343.xml, object 4 of 12", 1),
    "val": ("BloodImage_00338.xml, object 13 of 14", 1),
    "trainval": ("object", 2),
}


@pytest.mark.parametrize("split", WITHOUT_AREA)
def test_bccd(test_data, split):
    """The two boxes without area are found; every other box of this real set is exact, those at the border too."""
    root, (where, count) = test_data / "BCCD", WITHOUT_AREA[split]
    with pytest.warns(DataWarning, match=f"did not train on {count} x box without area .*{where}"):
        data = build_dataset(DataConfig(format="voc", root=str(root), train_split=split), "train")
    assert data.unused == {"box without area": count} and not data.skipped and data.clipped == 0
    assert data.classes == ["Platelets", "RBC", "WBC"]
    names = (root / "ImageSets" / "Main" / f"{split}.txt").read_text().split()
    assert data.file_names == [f"{name}.jpg" for name in names]
    left_out = 0
    for index, name in enumerate(names):
        target = data[index][1] if index < 3 else data.load(index)[1]
        raw = raw_objects(root / "Annotations" / f"{name}.xml")
        good = [(label, c) for label, c in raw if c[0] < c[2] and c[1] < c[3]]
        left_out += len(raw) - len(good)
        assert target["boxes"].tolist() == [[x1 - 1, y1 - 1, x2, y2] for _, (x1, y1, x2, y2) in good]
        assert [data.classes[i - 1] for i in target["labels"].tolist()] == [label for label, _ in good]
    assert left_out == count
    assert torch.cat([data[i][1]["boxes"] for i in range(20)]).min() == 0  # boxes that begin at the very border
