"""What is left out of a data set, how much of it may be, and what is said: areas, shares, backgrounds, names, paths."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
import torch

from doublehead.config import DataConfig, from_dict, to_dict
from doublehead.data import DataError, DataWarning, build_dataset, build_loader
from doublehead.engine.data_options import EvaluationData, data_config
from tests.support.data_samples import CocoFolder, VocFolder, picture

pytestmark = pytest.mark.filterwarnings("error::doublehead.data.DataWarning")  # only where a test expects one


@pytest.fixture
def coco(tmp_path):
    return CocoFolder(tmp_path / "set")


@pytest.fixture
def voc(tmp_path):
    return VocFolder(tmp_path / "set")


# ---------------------------------------------------------------------- boxes without area

NO_AREA = {
    "no width": [1, 2, 0, 3],
    "no height": [1, 2, 3, 0],
    "neither": [4, 5, 0, 0],
    "thin": [39, 2, 1e-7, 3],
    "on the border": [40, 2, 0, 3],
    "no height, as train2017's 2206849": [9.98, 27.27, 20.6, 0.0],
}


@pytest.mark.parametrize("mode", ["error", "skip"])
@pytest.mark.parametrize("case", NO_AREA)
def test_a_box_without_area_is_no_target_and_is_told(coco, case, mode):
    coco.content["annotations"].append(coco.box(918, 10, 3, NO_AREA[case]))
    with pytest.warns(DataWarning, match="did not train on 1 x box without area.*annotation 918") as caught:
        data = build_dataset(coco.config(on_bad_record=mode), "train")
    assert len(caught) == 1 and data.skipped == Counter()
    assert data.unused == {"image without boxes": 1, "crowd or difficult box": 1, "box without area": 1}
    assert data.left_out() == "1 x image without boxes, 1 x box without area, 1 x crowd or difficult box"
    assert data[0][1]["boxes"].tolist() == [[1.5, 2.25, 11.5, 22.75]]
    with pytest.warns(DataWarning, match="kept 1 x box without area.*counts as missed.*annotation 918"):
        data = build_dataset(coco.config(on_bad_record=mode), "val")
    assert data[0][1]["boxes"].tolist() == [[1.5, 2.25, 11.5, 22.75]] and data.unused["box without area"] == 1
    truth = {a["id"]: a for a in data.coco_ground_truth()["annotations"]}
    assert truth[918]["bbox"] == NO_AREA[case] and truth[918]["iscrowd"] == 0  # as pycocotools reads the file itself


def test_an_image_with_nothing_but_such_boxes_is_not_trained_on(coco):
    coco.content["annotations"].append(coco.box(918, 30, 3, [5, 5, 0, 9]))
    for background in ("drop", "keep"):  # there is something to be seen: it is no background
        with pytest.warns(DataWarning, match="without area"):
            data = build_dataset(coco.config(background=background), "train")
        assert data.image_ids == [10, 20]
        assert data.unused == {"image without boxes": 1, "crowd or difficult box": 1, "box without area": 1}


def test_in_voc_too(voc):
    voc.objects["two"].append(("frog", (5, 6, 5, 6), 0))
    voc.write()
    with pytest.warns(DataWarning, match=r"did not train on 1 x box without area.*object 2 of 2 \(frog\)"):
        train = build_dataset(voc.config(), "train")
    assert train[1][1]["boxes"].tolist() == [[10, 20, 30, 25]] and train.unused["box without area"] == 1
    with pytest.warns(DataWarning, match="kept 1 x box without area"):
        truth = build_dataset(voc.config(), "val").coco_ground_truth()["annotations"]
    assert [a["bbox"] for a in truth if a["image_id"] == 2] == [[10, 20, 20, 5], [5, 6, 0, 0]]
    assert truth[-1]["area"] == 0 and truth[-1]["ignore"] == 0


# ---------------------------------------------------------------------- how much may be left out


def many(coco, bad: int, total: int = 60) -> None:
    """`total` objects in the first image, `bad` of them turned round."""
    box = [[1, 1, -5, 5]] * bad + [[1, 1, 5, 5]] * (total - bad)
    coco.content["annotations"] = [coco.box(i, 10, 3, b) for i, b in enumerate(box, 1)]


@pytest.mark.parametrize("split", ["train", "val"])
def test_skip_has_a_limit(coco, split):
    many(coco, 6)
    with pytest.warns(DataWarning, match="left out 6 x degenerate box"):
        assert build_dataset(coco.config(on_bad_record="skip"), split).skipped == {"degenerate box": 6}
    many(coco, 7)
    with pytest.raises(DataError) as caught:
        build_dataset(coco.config(on_bad_record="skip"), split)
    assert caught.value.reason == "degenerate box"
    for said in (
        "7 of 60 objects are bad",
        "more than 10%",
        "7 x degenerate box, first: ",
        "annotation 1: ",
        "--data.max-skipped",
    ):
        assert said in str(caught.value)
    with pytest.warns(DataWarning):
        assert build_dataset(coco.config(on_bad_record="skip", max_skipped=0.12), split).skipped.total() == 7


def test_a_few_may_be_left_out_of_any_set_but_with_a_share_of_0_none(coco):
    many(coco, 3, 5)
    with pytest.warns(DataWarning, match="left out 3 x"):
        build_dataset(coco.config(on_bad_record="skip"), "val")
    many(coco, 1)
    with pytest.raises(DataError, match="1 of 60 objects are bad records, and none may be left out"):
        build_dataset(coco.config(on_bad_record="skip", max_skipped=0.0), "val")


def test_skip_never_leaves_nothing(coco):
    many(coco, 2, 2)
    with pytest.raises(DataError, match="all 2 objects are bad records: nothing would be left; 2 x degenerate box"):
        build_dataset(coco.config(on_bad_record="skip", max_skipped=1.0), "val")


def test_of_images_too(coco):
    template = coco.content["images"][0]
    coco.content["images"] += [template | {"id": 100 + i, "file_name": f"{i}.jpg"} for i in range(6)]
    with pytest.raises(DataError, match=r"6 of 9 images are bad records.*6 x missing image, first: .*0\.jpg"):
        build_dataset(coco.config(on_bad_record="skip"), "val")
    coco.content["images"] = coco.content["images"][3:]
    with pytest.raises(DataError, match="all 6 images are bad records"):
        build_dataset(coco.config(on_bad_record="skip", max_skipped=1.0), "val")


def test_annotations_beyond_a_limit_of_images_are_no_part_of_the_share(coco):
    coco.content["annotations"] += [coco.box(100 + i, 77, 3, [1, 1, 5, 5]) for i in range(50)]
    config = coco.config(on_bad_record="skip", val_images=1)
    with pytest.warns(DataWarning, match="50 x unknown image"):
        assert len(build_dataset(config, "val")) == 1
    with pytest.raises(DataError, match="50 of 53 objects"):
        build_dataset(coco.config(on_bad_record="skip"), "val")


def test_images_that_turn_out_broken_in_training_are_limited_too(coco):
    coco.content["images"], coco.content["annotations"] = [], []
    for i in range(1, 9):
        path = coco.root / "train" / f"{i}.png"
        picture(path)
        if i > 3:
            blob = bytearray(path.read_bytes())
            blob[len(blob) // 2] ^= 255  # header and end are whole
            path.write_bytes(bytes(blob))
        coco.content["images"].append({"id": i, "file_name": path.name, "width": 40, "height": 30})
        coco.content["annotations"].append(coco.box(i, i, 3, [1, 1, 9, 9]))
    batches = iter(build_loader(build_dataset(coco.config(on_bad_record="skip"), "train"), 8, train=True))
    with pytest.warns(DataWarning), pytest.raises(DataError, match=r"4 of its 8 images cannot be decoded.*max-skipped"):
        next(batches)


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_the_share_is_checked(coco, value):
    with pytest.raises(ValueError, match="max_skipped is"):
        build_dataset(coco.config(max_skipped=value), "val")


def test_the_number_of_workers_is_checked_before_the_work(coco):
    with pytest.raises(ValueError, match="data.workers is -1, a whole number of at least 0 is accepted"):
        build_dataset(coco.config(workers=-1), "val")


def test_the_record_at_fault_is_named_not_those_that_refer_to_it(coco):
    """An image whose id is none leaves its annotations without an image."""
    for wrong, said in (("10", r"images\[0\]: id is '10', an integer"), (20, r"images\[1\]: id 20 occurs a second")):
        coco.content["images"][0]["id"] = wrong
        with pytest.raises(DataError, match=said):
            build_dataset(coco.config(), "val")


# ---------------------------------------------------------------------- pictures without objects


def test_backgrounds_can_be_kept(coco):
    coco.content["annotations"].append(coco.box(8, 40, 3, [1, 1, 9, 9], iscrowd=1))  # d.jpg: a crowd alone
    for split in ("train", "val"):
        picture(coco.root / split / "d.jpg")
    coco.content["images"].append({"id": 40, "file_name": "d.jpg", "width": 40, "height": 30})
    dropped = build_dataset(coco.config(), "train")
    assert dropped.image_ids == [10, 20] and dropped.unused["image without boxes"] == 2
    kept = build_dataset(coco.config(background="keep"), "train")
    assert kept.image_ids == [10, 20, 30] and kept.unused["image without boxes"] == 1
    assert kept[2][1]["boxes"].shape == (0, 4)
    with pytest.raises(ValueError, match="background is 'maybe'"):
        build_dataset(coco.config(background="maybe"), "train")


def test_an_image_whose_objects_were_left_out_is_no_background(coco):
    spoilt = coco.box(8, 30, 3, [1, 1, 9, 9])
    for change in ({"bbox": [1, 1, -9, 9]}, {"id": None}, {"id": 1}, {"category_id": 99}):
        coco.content["annotations"][3:] = [spoilt | change]
        with pytest.warns(DataWarning, match="left out 1 x .*annotation"):
            data = build_dataset(coco.config(background="keep", on_bad_record="skip"), "train")
        assert data.image_ids == [10, 20] and data.skipped.total() == 1


def test_backgrounds_of_voc(voc):
    voc.write()
    assert build_dataset(voc.config(background="keep"), "train").file_names == ["one.jpg", "two.jpg", "bare.jpg"]


def test_backgrounds_alone_are_no_training_set(coco):
    coco.content["annotations"] = []
    with pytest.raises(DataError, match="no image with a box"):
        build_dataset(coco.config(background="keep"), "train")


def test_a_detector_learns_from_backgrounds(coco):
    """The loss of a batch of backgrounds alone, and of a mixed one, is finite, and has gradients."""
    from doublehead.models import build_detector
    from doublehead.recipes import RECIPES

    torch.manual_seed(0)
    data = build_dataset(coco.config(background="keep"), "train")
    model = build_detector(RECIPES["shapes-ext"].model, 3).train()
    for chosen in ([2], [0, 2]):
        images, targets = zip(*(data[i] for i in chosen), strict=True)
        loss = sum(model([torch.nn.functional.pad(i, (0, 24, 0, 34)) for i in images], list(targets)).values())
        loss.backward()
        assert loss.isfinite() and any(p.grad.abs().sum() > 0 for p in model.parameters() if p.grad is not None)
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_recipes_without_the_new_fields_load():
    values = to_dict(DataConfig("coco", "x"))
    for name in ("max_skipped", "background", "outside_root"):
        del values[name]
    assert from_dict(values, DataConfig) == DataConfig("coco", "x")


# ---------------------------------------------------------------------- ignore


def test_ignored_annotations_are_neither_trained_on_nor_measured(coco):
    coco.content["annotations"][0]["ignore"] = 1
    data = build_dataset(coco.config(), "val")
    assert data[0][1]["boxes"].tolist() == [] and data.unused["crowd or difficult box"] == 2
    truth = {a["id"]: (a["iscrowd"], a["ignore"]) for a in data.coco_ground_truth()["annotations"]}
    assert truth == {1: (1, 1), 5: (1, 1), 4: (0, 0)}
    assert build_dataset(coco.config(), "train").image_ids == [20]
    for value in (2, "1", -1, [1]):
        coco.content["annotations"][0]["ignore"] = value
        with pytest.raises(DataError, match=f"annotation 1: ignore is {re.escape(repr(value))}, 0 or 1 is accepted"):
            build_dataset(coco.config(), "val")


# ---------------------------------------------------------------------- class names


@pytest.mark.parametrize("name", ["person\n", " person", "\ufeffperson", "person\u2028"])
def test_white_space_around_names_is_taken_off(coco, voc, name):
    coco.content["categories"][0]["name"] = name
    assert build_dataset(coco.config(), "val").classes == ["dog", "person"]
    data = build_dataset(coco.config(), "val", classes=[name, "dog"])  # of an older checkpoint
    assert data.category_ids == [7, 3] and data[0][1]["labels"].tolist() == [1]


WRONG_NAMES = {
    "a\nb": "control character",
    "a\tb": "control character",
    "\x7fa": "control character",
    "a\x85b": "control character",
    "a\u2028b": "line break",
    "\ud800": "surrogate",
    " \n": "is empty",
    "": "a string is accepted",
    5: "a string is accepted",
}


@pytest.mark.parametrize("name", WRONG_NAMES)
def test_names_that_would_break_lists_or_pictures_are_refused(coco, name):
    coco.content["categories"][0]["name"] = name
    with pytest.raises(DataError, match=rf"categories\[0\]: name.*{WRONG_NAMES[name]}") as caught:
        build_dataset(coco.config(), "val")
    assert "\n" not in str(caught.value)


def test_names_that_differ_in_white_space_alone_are_one(coco):
    coco.content["categories"][0]["name"] = "dog\n"
    with pytest.raises(DataError, match=r"categories\[1\]: id 3 or name 'dog' occurs a second time"):
        build_dataset(coco.config(), "val")


def test_voc_names(voc):
    voc.objects["two"] = [("red\ncar", (1, 1, 9, 9), 0)]
    voc.write()
    with pytest.raises(DataError, match=r"object 1 of 1 \('red\\ncar'\): name 'red\\ncar' has a control character"):
        build_dataset(voc.config(), "val")
    with pytest.warns(DataWarning):
        assert build_dataset(voc.config(on_bad_record="skip"), "val").classes == ["frog", "newt"]


def test_another_spelling_is_named(coco, voc):
    with pytest.raises(DataError) as caught:
        build_dataset(coco.config(), "val", classes=["Cat", "D og"])
    for said in (
        "class 'cat' is not among the classes Cat, D og",
        "'Cat' differs",
        "case or white space",
        "the file's are dog, cat",
    ):
        assert said in str(caught.value)
    voc.write()
    with pytest.raises(DataError, match="class 'frog' is not among the classes newt, Frog; 'Frog' differs from it"):
        build_dataset(voc.config(), "val", classes=["newt", "Frog"])
    for data, classes in (
        (coco.config(on_bad_record="skip"), ["Cat"]),
        (voc.config(on_bad_record="skip"), ["axolotl"]),
    ):
        said = "all 3 objects are bad records.* 3 x unknown category, first: .*class '(cat|frog)'"
        with pytest.raises(DataError, match=said):
            build_dataset(data, "val", classes=classes)


def test_a_new_id_of_a_class_is_no_category_of_the_file(coco):
    coco.content["annotations"][0]["category_id"] = 8  # the id that the class below gets
    with pytest.raises(DataError, match="category_id 8 is not among the categories"):
        build_dataset(coco.config(), "val", classes=["cat", "yak", "dog"])


# ---------------------------------------------------------------------- paths


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("split", ["train", "val"])
def test_images_outside_of_the_data(coco, split, absolute):
    outside = coco.root.parent / "secret.png"
    picture(outside)
    name = str(outside) if absolute else "../../secret.png"
    coco.content["images"][0]["file_name"] = name
    with pytest.raises(DataError) as caught:
        build_dataset(coco.config(), split)
    assert caught.value.reason == "path outside of the data" and "--data.outside-root" in str(caught.value)
    assert f"images[0]: file_name: {name!r}" in str(caught.value)
    assert build_dataset(coco.config(outside_root=True), split).file_names[0] == name


def test_voc_lists_that_lead_outside(voc):
    voc.listed.append("../JPEGImages/one")
    voc.write()
    with pytest.raises(DataError, match=r"val.txt, line 4: '../JPEGImages/one' has '..' in it"):
        build_dataset(voc.config(), "val")
    voc.listed[-1] = str(voc.root / "JPEGImages" / "one")
    voc.write()
    with pytest.raises(DataError, match="line 4: .*is an absolute path"):
        build_dataset(voc.config(), "val")


def test_a_linked_folder_and_sub_folders_are_followed(coco):
    config = coco.config()
    (coco.root / "val").rename(coco.root.parent / "elsewhere")
    (coco.root / "val").symlink_to(coco.root.parent / "elsewhere", target_is_directory=True)
    assert len(build_dataset(config, "val")) == 3
    (coco.root / "val" / "sub..dir").mkdir()
    (coco.root / "val" / "a.jpg").rename(coco.root / "val" / "sub..dir" / "a.jpg")
    coco.content["images"][0]["file_name"] = "sub..dir/a.jpg"
    assert build_dataset(coco.config(), "val").file_names[0] == "sub..dir/a.jpg"


def test_an_evaluation_is_as_the_training_was_or_as_it_is_told():
    trained = DataConfig("shapes", outside_root=True, max_skipped=0.3)
    assert data_config(trained, EvaluationData()) == trained
    given = EvaluationData(outside_root=True, max_skipped=0.0)
    told = data_config(DataConfig("shapes"), given)
    assert (told.outside_root, told.max_skipped) == (True, 0.0)


# ---------------------------------------------------------------------- other JSON

BOX = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}
OTHER_JSON = {
    "detections": ([BOX], "a list of detections"),
    "captions": ({"images": [], "annotations": [{"id": 1, "image_id": 1, "caption": "x"}]}, "COCO's captions"),
    "panoptic": (
        {"images": [], "annotations": [{"image_id": 1, "segments_info": []}], "categories": [{"id": 1, "name": "x"}]},
        "COCO's panoptic annotations",
    ),
    "LabelMe": ({"version": "5", "shapes": [], "imagePath": "a.jpg"}, "LabelMe's annotation of one picture"),
    "VIA": ({"a.jpg": {"filename": "a.jpg", "regions": []}}, "VGG Image Annotator"),
    "CreateML": ([{"image": "a.jpg", "annotations": []}], "CreateML"),
}


@pytest.mark.parametrize("kind", OTHER_JSON)
def test_other_json_is_named(coco, kind):
    config = coco.config(on_bad_record="skip")
    content, said = OTHER_JSON[kind]
    coco.json_file("val").write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"instances_val.json: .*not COCO instances; it seems to be .*{said}"):
        build_dataset(config, "val")


def test_coco_files_may_have_more_than_coco_says(coco):
    coco.content |= {"info": {"regions": ["here"]}, "shapes": []}
    assert len(build_dataset(coco.config(), "val")) == 3


def test_messages_are_one_line_whatever_a_file_is_called(coco):
    """Names come with the annotations: terminals obey what stands in them."""
    for name in ("a\nb.jpg", "a\x1b[2Jb.jpg", "a\ud800b.jpg", "a\u2028b.jpg"):
        coco.content["images"][0]["file_name"] = name
        with pytest.raises(DataError) as caught:
            build_dataset(coco.config(), "val")
        assert str(caught.value).isprintable() and ascii(name)[1:-1] in str(caught.value)


@pytest.mark.parametrize("size", [(0, 0), (None, None), (0, None), (0.0, 0.0), (30.0, 40.0)])
def test_coco_sizes_that_say_nothing_or_have_a_point(coco, size):
    coco.content["images"][0] |= {"height": size[0], "width": size[1]}
    sizes = build_dataset(coco.config(), "val").image_sizes
    assert sizes[0] == (30, 40) and all(type(side) is int for side in sizes[0])


# ---------------------------------------------------------------------- what a training says


def test_the_start_of_a_run_says_what_is_left_out(coco, capsys):
    from types import SimpleNamespace

    from doublehead.config import Recipe
    from doublehead.engine.banner import say_start
    from doublehead.engine.distributed import World

    config = coco.config()
    trainer = SimpleNamespace(model=torch.nn.Linear(1, 1), step=0)
    training = build_dataset(config, "train")
    world = World(device=torch.device("cpu"))
    say_start(Recipe(data=config), coco.root, world, training, trainer, state=None, machine={}, data="")
    said = capsys.readouterr()
    assert "left out of training: 1 x image without boxes, 1 x crowd or difficult box\n" in said.out + said.err
