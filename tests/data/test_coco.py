"""COCO JSON: exact contents, and every kind of bad record in both modes."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from doublehead.config import DataConfig
from doublehead.data import DataError, DataWarning, build_dataset
from tests.support.data_samples import CocoFolder, picture

pytestmark = pytest.mark.filterwarnings("error::doublehead.data.DataWarning")  # only where a test expects one


@pytest.fixture
def coco(tmp_path):
    return CocoFolder(tmp_path / "set")


def boxes_of(dataset) -> list[list[list[float]]]:
    return [dataset[i][1]["boxes"].tolist() for i in range(len(dataset))]


def test_contents(coco):
    data = build_dataset(coco.config(), "val")
    assert data.classes == ["dog", "cat"] and data.category_ids == [3, 7]  # by id, whatever their order in the file
    assert data.image_ids == [10, 20, 30] and data.file_names == ["a.jpg", "b.jpg", "c.jpg"]
    assert data.image_sizes == [(30, 40), (40, 30), (30, 50)]
    assert boxes_of(data) == [[[1.5, 2.25, 11.5, 22.75]], [[20, 30, 30, 40]], []]
    image, target = data[0]
    assert image.dtype == torch.uint8 and image.shape == (3, 30, 40)
    assert target["labels"].tolist() == [2] and target["labels"].dtype == torch.int64
    assert target["boxes"].dtype == torch.float32 and target["image_id"] == 10
    assert data[2][1]["boxes"].shape == (0, 4)
    assert data[-2][1]["image_id"] == 20 and data[-2][1]["boxes"].tolist() == [[20, 30, 30, 40]]
    with pytest.raises(IndexError):
        data[3]


def test_training_leaves_out_what_it_cannot_learn_from(coco):
    coco.content["annotations"].append(coco.box(8, 30, 3, [1, 1, 9, 9], iscrowd=1))  # now c.jpg has a crowd alone
    data = build_dataset(coco.config(), "train")
    assert data.image_ids == [10, 20]
    assert data.unused == {"image without boxes": 1, "crowd or difficult box": 1}
    assert data.skipped == Counter()
    assert build_dataset(coco.config(), "val").image_ids == [10, 20, 30]


def test_a_test_split_has_no_boxes_and_other_names(coco):
    """As COCO publishes test-dev2017: image_info_*.json without annotations, images in test2017."""
    coco.config()
    content = {key: value for key, value in coco.content.items() if key != "annotations"}
    (coco.root / "annotations" / "image_info_test-dev2017.json").write_text(json.dumps(content))
    (coco.root / "val").rename(coco.root / "test2017")
    data = build_dataset(DataConfig("coco", str(coco.root), val_split="test-dev2017"), "val")
    assert data.image_ids == [10, 20, 30] and boxes_of(data) == [[], [], []]
    assert data[1][0].shape == (3, 40, 30) and data.coco_ground_truth()["annotations"] == []
    instances = coco.json_file("train")
    del coco.content["annotations"]
    instances.write_text(json.dumps(coco.content))
    with pytest.raises(DataError, match="no list 'annotations'"):  # of a split that should have boxes
        build_dataset(DataConfig("coco", str(coco.root), train_split="train"), "train")


def test_ground_truth_is_the_file(coco):
    truth = build_dataset(coco.config(), "val").coco_ground_truth()
    found = [{k: v for k, v in a.items() if k != "ignore"} for a in truth["annotations"]]
    assert found == coco.content["annotations"]
    assert truth["images"] == coco.content["images"]
    assert {c["id"]: c["name"] for c in truth["categories"]} == {3: "dog", 7: "cat"}


def test_limit_takes_the_first_usable_images(coco):
    coco.content["images"].reverse()
    assert build_dataset(coco.config(train_images=1), "train").image_ids == [20]
    assert build_dataset(coco.config(val_images=2), "val").image_ids == [30, 20]
    coco.content["images"].reverse()
    coco.content["annotations"][2]["category_id"] = 99  # of image 20, which is not reached
    assert build_dataset(coco.config(train_images=1), "train").image_ids == [10]


def test_classes_of_a_detector(coco):
    data = build_dataset(coco.config(), "val", classes=["cat", "yak", "dog"])
    assert data.classes == ["cat", "yak", "dog"] and data.category_ids == [7, 8, 3]
    assert [data[i][1]["labels"].tolist() for i in range(2)] == [[1], [3]]
    with pytest.raises(DataError, match="annotation 5.*category_id 3"):
        build_dataset(coco.config(), "val", classes=["cat"])


def test_missing_size_area_and_crowd(coco):
    for image in coco.content["images"]:
        del image["width"], image["height"]
    for annotation in coco.content["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    data = build_dataset(coco.config(), "val")
    assert data.image_sizes == [(30, 40), (40, 30), (30, 50)]
    assert sorted(a["area"] for a in data.coco_ground_truth()["annotations"]) == [100, 205, 1200]
    assert len(data[0][1]["boxes"]) == 2


def test_box_over_the_border_is_cut_and_told(coco):
    coco.content["annotations"][0]["bbox"] = [-1, 2, 10, 29]
    coco.content["annotations"][2]["bbox"] = [20, 30, 10.0000001, 10]  # arithmetic, not worth a word
    with pytest.warns(DataWarning, match=r"cut 1 x box.*annotation 1") as caught:
        data = build_dataset(coco.config(), "val")
    assert len(caught) == 1 and data.clipped == 1 and data.skipped == Counter()
    assert boxes_of(data)[:2] == [[[0, 2, 9, 30]], [[20, 30, 30, 40]]]
    assert data.coco_ground_truth()["annotations"][0]["bbox"] == [-1, 2, 10, 29]  # as in the file: comparable numbers


def change(where: str, index: int, **values):
    def apply(coco):
        coco.content[where][index].update(values)

    return apply


def repeat(where: str, index: int, **values):
    def apply(coco):
        coco.content[where].append({**coco.content[where][index], **values})

    return apply


def truncated(coco):
    for split in ("train", "val"):
        path = coco.root / split / "a.jpg"
        path.write_bytes(path.read_bytes()[:-40])


def missing(coco):
    for split in ("train", "val"):
        (coco.root / split / "a.jpg").unlink()


def empty(coco):
    for split in ("train", "val"):
        (coco.root / split / "a.jpg").write_bytes(b"")


BAD_RECORDS = {
    # how to break it, the reason, the record named, the images and the number of boxes (crowd too) that remain in val
    "missing image": (missing, "missing image", "a.jpg", [20, 30], 1),
    "truncated image": (truncated, "unreadable image", "a.jpg", [20, 30], 1),
    "empty image": (empty, "unreadable image", "a.jpg", [20, 30], 1),
    "wrong size": (change("images", 0, width=41), "wrong image size", "a.jpg", [20, 30], 1),
    "swapped size": (change("images", 0, width=30, height=40), "wrong image size", "a.jpg", [20, 30], 1),
    "size zero": (change("images", 0, width=0), "malformed record", "images[0]", [20, 30], 1),
    "half a size": (change("images", 0, width=None), "malformed record", "images[0]", [20, 30], 1),
    "no file name": (change("images", 0, file_name=None), "malformed record", "images[0]", [20, 30], 1),
    "image id text": (change("images", 2, id="x"), "malformed record", "images[2]", [10, 20], 3),
    "image not an object": (lambda c: c.content["images"].append(3), "malformed record", "images[3]", [10, 20, 30], 3),
    "repeated image": (repeat("images", 0), "duplicate image id", "images[3]", [10, 20, 30], 3),
    "repeated annotation": (repeat("annotations", 0), "duplicate annotation id", "annotation 1", [10, 20, 30], 3),
    "no annotation id": (change("annotations", 0, id=None), "malformed record", "annotations[0]", [10, 20, 30], 2),
    "of no image": (change("annotations", 0, image_id=11), "unknown image", "annotation 1", [10, 20, 30], 2),
    "category": (change("annotations", 0, category_id=4), "unknown category", "annotation 1", [10, 20, 30], 2),
    "annotation id true": (change("annotations", 0, id=True), "malformed record", "annotations[0]", [10, 20, 30], 2),
    "height < 0": (change("annotations", 0, bbox=[1, 9, 3, -3]), "degenerate box", "annotation 1", [10, 20, 30], 2),
    "no width, outside": (change("annotations", 0, bbox=[41, 2, 0, 3]), "box outside the image", "annotation 1",
                          [10, 20, 30], 2),
    "outside": (change("annotations", 0, bbox=[40, 2, 5, 3]), "box outside the image", "annotation 1", [10, 20, 30], 2),
    "above": (change("annotations", 0, bbox=[4, -9, 5, 9]), "box outside the image", "annotation 1", [10, 20, 30], 2),
    "nan": (change("annotations", 0, bbox=[math.nan, 2, 5, 3]), "non-finite box", "annotation 1", [10, 20, 30], 2),
    "inf": (change("annotations", 0, bbox=[1, 2, math.inf, 3]), "non-finite box", "annotation 1", [10, 20, 30], 2),
    "three numbers": (change("annotations", 0, bbox=[1, 2, 5]), "malformed box", "annotation 1", [10, 20, 30], 2),
    "text": (change("annotations", 0, bbox=[1, 2, 5, "3"]), "malformed box", "annotation 1", [10, 20, 30], 2),
    "no box": (change("annotations", 0, bbox=None), "malformed box", "annotation 1", [10, 20, 30], 2),
    "area nan": (change("annotations", 0, area=math.nan), "malformed record", "annotation 1", [10, 20, 30], 2),
    "crowd 2": (change("annotations", 0, iscrowd=2), "malformed record", "annotation 1", [10, 20, 30], 2),
}  # fmt: skip


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("case", BAD_RECORDS)
def test_bad_record_is_one_clear_error(coco, case, split):
    break_it, reason, record, _, _ = BAD_RECORDS[case]
    break_it(coco)
    with pytest.raises(DataError) as caught:
        build_dataset(coco.config(), split)
    assert caught.value.reason == reason
    file = coco.root / split / record if record.endswith(".jpg") else coco.json_file(split)
    assert str(caught.value).startswith(str(file)) and record in str(caught.value)
    assert "--data.on-bad-record skip" in str(caught.value)


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_bad_record_is_left_out_and_counted(coco, case):
    break_it, reason, record, images, count = BAD_RECORDS[case]
    break_it(coco)
    with pytest.warns(DataWarning) as caught:
        data = build_dataset(coco.config(on_bad_record="skip"), "val")
    assert len(caught) == 1 and record in str(caught[0].message) and f"1 x {reason}" in str(caught[0].message)
    assert data.skipped == {reason: 1}
    assert data.image_ids == images
    assert len(data.coco_ground_truth()["annotations"]) == count
    for index in range(len(data)):
        assert data[index][0].shape[1:] == data.image_sizes[index]


def test_one_warning_sums_up_many(coco):
    missing(coco)
    coco.content["annotations"] += [coco.box(90 + i, 20, 3, [1, 1, -1, 5]) for i in range(3)]
    with pytest.warns(DataWarning) as caught:
        data = build_dataset(coco.config(on_bad_record="skip"), "train")
    assert len(caught) == 1 and data.skipped == {"missing image": 1, "degenerate box": 3}
    assert "annotation 90" in str(caught[0].message) and "annotation 91" not in str(caught[0].message)


USELESS = {
    "not JSON": ('{"images": [', "invalid JSON.*line 1 column"),
    "a list": ("[]", "no list 'images'"),
    "no annotations": ('{"images": [], "categories": []}', "no list 'annotations'"),
    "no categories": ('{"images": [], "annotations": [], "categories": []}', "no categories"),
    "no images": ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "x"}]}', "no image"),
    "category twice": (
        '{"images":[],"annotations":[],"categories":[{"id":1,"name":"x"},{"id":1,"name":"y"}]}',
        "second",
    ),
    "name twice": ('{"images":[],"annotations":[],"categories":[{"id":1,"name":"x"},{"id":2,"name":"x"}]}', "second"),
    "no name": ('{"images":[],"annotations":[],"categories":[{"id":1}]}', "name is None"),
    "nested too deep": ("[" * 100_000, "invalid JSON"),
}


@pytest.mark.parametrize("mode", ["error", "skip"])
@pytest.mark.parametrize("case", USELESS)
def test_useless_file_is_an_error_in_both_modes(coco, case, mode):
    text, message = USELESS[case]
    config = coco.config(on_bad_record=mode)
    coco.json_file("val").write_text(text)
    with pytest.raises(DataError, match=message):
        build_dataset(config, "val")


def test_no_image_left(coco):
    coco.content["annotations"] = []
    with pytest.raises(DataError, match="no image with a box"):
        build_dataset(coco.config(), "train")
    assert len(build_dataset(coco.config(), "val")) == 3


def test_missing_files_and_folders(coco, tmp_path):
    with pytest.raises(DataError, match="instances_test.json: no such file; splits there: train, val"):
        build_dataset(coco.config(val_split="test"), "val")
    with pytest.raises(DataError, match="data.root is missing"):
        build_dataset(DataConfig(format="coco"), "val")
    with pytest.raises(DataError, match="nowhere: no such folder"):
        build_dataset(DataConfig(format="coco", root=str(tmp_path / "nowhere")), "val")
    config = coco.config()
    (coco.root / "val").rename(coco.root / "elsewhere")
    with pytest.raises(DataError, match="val: no such folder"):
        build_dataset(config, "val")
    (coco.root / "images").mkdir()
    (coco.root / "elsewhere").rename(coco.root / "images" / "val")
    assert len(build_dataset(config, "val")) == 3


def test_a_year_is_found(coco):
    config = coco.config()
    coco.json_file("val").rename(coco.json_file("val2017"))
    (coco.root / "val").rename(coco.root / "val2017")
    assert build_dataset(config, "val").image_ids == [10, 20, 30]
    coco.json_file("val2014").write_text("{}")
    with pytest.raises(DataError, match="splits there: train, val2014, val2017"):
        build_dataset(config, "val")


def test_byte_order_mark(coco):
    config = coco.config()
    coco.json_file("val").write_text(json.dumps(coco.content), "utf-8-sig")
    assert len(build_dataset(config, "val")) == 3


@pytest.mark.parametrize("field, value", [("on_bad_record", "ignore"), ("val_images", 0), ("format", "csv")])
def test_configuration_is_checked(coco, field, value):
    config = DataConfig(**{"format": "coco", "root": str(coco.root), field: value})
    with pytest.raises(ValueError, match=f"{field} is {value!r}"):
        build_dataset(config, "val")
    with pytest.raises(ValueError, match="split"):
        build_dataset(config, "test")


def test_skip_mode_finds_broken_pixels_before_an_evaluation(coco):
    coco.content["images"][0]["file_name"] = "a.png"
    for split in ("train", "val"):
        path = coco.root / split / "a.png"
        picture(path)
        blob = bytearray(path.read_bytes())
        blob[len(blob) // 2] ^= 255  # header and end are whole
        path.write_bytes(bytes(blob))
    assert build_dataset(coco.config(), "val").image_ids == [10, 20, 30]  # error mode: told when it is read
    with pytest.raises(DataError, match="a.png"):
        build_dataset(coco.config(), "val")[0]
    with pytest.warns(DataWarning, match="unreadable"):
        data = build_dataset(coco.config(on_bad_record="skip"), "val")
    assert data.image_ids == [20, 30] and data.skipped == {"unreadable image": 1}


@pytest.mark.parametrize("split", ["train", "val"])
def test_tiny_coco_against_pycocotools(test_data, split):
    from pycocotools.coco import COCO

    root = test_data / "tiny_coco"
    file = COCO(str(root / "annotations" / f"instances_{split}2017.json"))
    data = build_dataset(DataConfig(format="coco", root=str(root)), split)
    assert data.category_ids == sorted(file.getCatIds()) and len(data.classes) == 80
    assert data.classes == [file.cats[i]["name"] for i in data.category_ids]
    expected = [i for i in file.dataset["images"]]
    if split == "train":
        expected = [i for i in expected if file.getAnnIds(imgIds=i["id"], iscrowd=False)]
        assert len(expected) < len(file.imgs)
    assert data.image_ids == [i["id"] for i in expected]
    for index, entry in enumerate(expected):
        image, target = data[index]
        with Image.open(root / f"{split}2017" / entry["file_name"]) as pixels:
            assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(pixels.convert("RGB")))
        annotations = file.loadAnns(file.getAnnIds(imgIds=entry["id"], iscrowd=False))
        corners = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in annotations)]
        assert torch.equal(target["boxes"], torch.tensor(corners, dtype=torch.float64).float().reshape(-1, 4))
        assert [data.category_ids[i - 1] for i in target["labels"].tolist()] == [a["category_id"] for a in annotations]
    keys = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    truth = {a["id"]: a for a in data.coco_ground_truth()["annotations"]}
    kept = [a for a in file.dataset["annotations"] if a["image_id"] in set(data.image_ids)]
    assert sum(a["iscrowd"] for a in kept) > 0 and len(truth) == len(kept)
    assert all(truth[a["id"]][k] == a[k] for a in kept for k in keys)


def test_tiny_coco_scores_itself_perfect(test_data):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    data = build_dataset(DataConfig(format="coco", root=str(test_data / "tiny_coco")), "val")
    truth = COCO()
    truth.dataset = data.coco_ground_truth()
    truth.createIndex()
    found = [
        {"image_id": target["image_id"], "category_id": data.category_ids[label - 1], "score": 1.0,
         "bbox": [x1, y1, x2 - x1, y2 - y1]}
        for _, target in (data[i] for i in range(len(data)))
        for (x1, y1, x2, y2), label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True)
    ]  # fmt: skip
    scores = COCOeval(truth, truth.loadRes(found), "bbox")
    scores.evaluate()
    scores.accumulate()
    scores.summarize()
    assert scores.stats[0] == pytest.approx(1.0) and scores.stats[1] == pytest.approx(1.0)
