"""`doublehead data DIR`: what it counts and draws, what it refuses, and that it writes nothing where it refuses."""

import hashlib
import json
import shutil

import pytest
from PIL import Image

from doublehead.cli.data import main
from doublehead.cli.train import parse
from tests.support.data_samples import CocoFolder, VocFolder
from tests.support.layouts import write_layout


@pytest.fixture
def coco(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = CocoFolder(tmp_path / "set")
    folder.config()
    return folder


def count(*arguments):
    """The command's exit code."""
    try:
        main([str(a) for a in arguments])
    except SystemExit as stop:
        return stop.code
    return 0


def digests(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_counts_and_sheet(coco, tmp_path, capsys):
    assert count("set", "--data.format", "coco", "--json", "counts.json") == 0
    shown = capsys.readouterr().out
    answer = json.loads((tmp_path / "counts.json").read_text())
    rows = [line.split() for line in shown.splitlines()]
    assert ["dog", *"1 1 - - 1 1 1 - - 1".split()] in rows and ["cat", *"1 1 - - 1 1 1 - - 1".split()] in rows
    assert ["all", *"2 2 - - 2 2 2 - - 2".split()] in rows
    assert ["images", "3", "3"] in rows and ["images", "without", "boxes", "1", "1"] in rows
    assert ["crowd", "or", "difficult", "1", "1"] in rows
    assert shown.startswith("COCO: 2 train, 3 val, 2 classes\n\n") and shown.startswith(answer["said"])
    assert max(map(len, shown.splitlines()[:8])) <= 100
    assert "- 2 pictures are in train and in val, so that AP is too high; the first is " in shown
    assert "- few boxes to learn from (fewer than 20): dog 1, cat 1\n" in shown
    assert shown.endswith(
        "pictures with their boxes: data-set.png\ncounts: counts.json\n"
        "to train: doublehead train --data.root set --data.format coco\n"
    )
    train = answer["splits"]["train"]
    assert (train["images"], train["without_boxes"], train["widths"], train["heights"]) == (
        3, 1, [30, 35.0, 40], [30, 35.0, 40]
    )  # fmt: skip
    assert train["classes"]["cat"] == {"boxes": 1, "small": 1, "medium": 0, "large": 0, "images": 1}
    assert len(answer["repeated"]["across"]) == 2 and answer["repeated"]["within"] == []
    with Image.open(tmp_path / "data-set.png") as sheet:
        assert sheet.width == 4 * 432 + 12 and 700 < sheet.height < 2 * 460  # 2 + 3 pictures in two rows


def test_sizes_are_cocos(coco, capsys):
    for annotation, area in zip(coco.content["annotations"], (32 * 32, 1.0, 96 * 96), strict=True):
        annotation["area"] = float(area)
    coco.config()
    assert count("set", "--data.format", "coco") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["cat", *"1 - 1 - 1 1 - 1 - 1".split()] in rows and ["dog", *"1 - - 1 1 1 - - 1 1".split()] in rows


def test_difficult_and_own_names_of_voc(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    VocFolder(tmp_path / "a set").write()
    assert count("--data.root", "a set", "--data.format", "voc") == 0
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines()]
    assert ["frog", *"1 - 1 - 1 1 - 1 - 1".split()] in rows and ["crowd", "or", "difficult", "1", "1"] in rows
    assert shown.endswith("data-a set.png\nto train: doublehead train --data.root 'a set' --data.format voc\n")


def test_bad_records_are_counted_with_the_first_of_each(coco, capsys):
    annotations = coco.content["annotations"]
    annotations += [coco.box(9, 10, 99, [1, 1, 5, 5]), coco.box(10, 10, 3, [1, 1, -5, 5])]
    annotations += [coco.box(number, 10, 99, [1, 1, 5, 5]) for number in range(20, 40)]  # most of them
    annotations += [coco.box(11, 10, 3, [-5, 1, 25, 25]), coco.box(12, 10, 3, [5, 5, 0, 5])]
    (coco.root / "train" / "c.jpg").unlink()
    coco.config()
    assert count("set", "--data.format", "coco") == 0
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines()]
    assert ["bad", "records", "23", "22"] in rows
    assert ["boxes", "without", "area", "1", "1"] in rows and ["boxes", "cut", "at", "the", "border", "1", "1"] in rows
    path = "set/annotations/instances_{}.json"
    for said in (
        f"- train: left out 21 x unknown category, first: {path.format('train')}, annotation 9: category_id 99",
        f"- val: left out 1 x degenerate box, first: {path.format('val')}, annotation 10",
        "- train: left out 1 x missing image, first: ",
        "- train: cut 1 x box at the image's border, first: ",
        "- train: did not train on 1 x box without area",
    ):  # fmt: skip
        assert said in shown, said
    assert shown.endswith("--data.root set --data.format coco --data.on-bad-record skip\n")


def test_one_split_that_cannot_be_read_is_named_and_the_other_counted(coco, capsys):
    shutil.rmtree(coco.root / "val")
    assert count("set", "--data.format", "coco") == 1
    shown = capsys.readouterr().out
    assert "- val: cannot be read: set/val: no such folder" in shown and "to train" not in shown
    assert ["all", *"2 2 - - 2".split()] in [line.split() for line in shown.splitlines()]


def test_all_bad_is_one_line(coco, tmp_path, capsys):
    for split in ("train", "val"):
        for name in "abc":
            (coco.root / split / f"{name}.jpg").write_bytes(b"no picture")
    before = digests(tmp_path)
    assert count("set", "--data.format", "coco") == 2
    said = capsys.readouterr()
    assert "all 3 images are bad records: nothing would be left; 3 x unreadable image, first: " in said.err
    assert said.out == "" and len(said.err.splitlines()) == 1 and digests(tmp_path) == before


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "the folder of the data set is missing: doublehead data DIR"),
        (["set", "--data.root", "set"], "DIR set and --data.root set are the same: give one"),
        (["nowhere"], "nowhere: no such folder (data.root)"),
        (["set/train/a.jpg"], "set/train/a.jpg: a file, not a folder (data.root); give the data set's folder"),
        (["set", "--out", "sheet.txt"], "--out sheet.txt: the name of a picture is accepted, ending in .png"),
        (["set", "--out", "no/where.png"], "--out no/where.png: cannot be written: give a file in a folder"),
        (["set", "--out", "old.png"], "--out old.png: exists: give another file, or --overwrite to replace it"),
        (["set", "--json", "old.png"], "--json old.png: exists: give another file, or --overwrite to replace it"),
        (["set", "--json", "set"], "--json set: cannot be written"),
        (["set", "--out", "new.png", "--json", "./new.png"], "--out and --json are both new.png"),
        (["set", "--data.val-share", "2"], "val_share"),
        (["set", "--data.split-seed", "-1"], "split_seed"),
        (["set", "--data.train-images", "0"], "train_images"),
        (["set", "--data.max-pixels", "0"], "max_pixels"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_change_nothing(coco, tmp_path, capsys, arguments, said):
    (tmp_path / "old.png").write_text("mine")
    before = digests(tmp_path)
    assert count(*arguments, "--data.format", "coco") == 2
    shown = capsys.readouterr()
    assert said in shown.err and shown.err.startswith("error: ") and len(shown.err.splitlines()) == 1, shown.err
    assert shown.out == "" and digests(tmp_path) == before


def test_overwrite_replaces(coco, tmp_path):
    (tmp_path / "data-set.png").write_text("mine")
    assert count("set", "--data.format", "coco") == 2
    assert count("set", "--data.format", "coco", "--overwrite") == 0
    assert Image.open(tmp_path / "data-set.png").format == "PNG"


def test_the_line_to_train_repeats_the_options_and_train_understands_it(coco, capsys):
    options = (
        "--data.format coco --data.val-split train --data.classes dog cat --data.train-images 2 --data.val-images 2"
    )
    options += " --data.max-pixels 99999 --data.val-share 0.5 --data.split-seed 3 --data.outside-root"
    assert count("set", *options.split()) == 0
    line = capsys.readouterr().out.splitlines()[-1].removeprefix("to train: ")
    assert set(line.split()) == {"doublehead", "train", "--data.root", "set", *options.split()}
    data = parse(line.split()[2:]).recipe.data
    assert (data.root, data.format, data.val_split, data.classes) == ("set", "coco", "train", ("dog", "cat"))
    assert (data.train_images, data.val_images, data.max_pixels, data.outside_root) == (2, 2, 99999, True)
    assert (data.val_share, data.split_seed) == (0.5, 3)


@pytest.mark.parametrize(
    "layout, first",
    [
        ("yolo-roboflow", "YOLO with data.yaml: 4 train, 3 val, 2 classes"),
        ("labelme", "LabelMe: 3 train, 2 val, 2 classes; one split: 20% held out by seed 0"),
    ],
)
def test_data_as_they_lie(tmp_path, monkeypatch, capsys, layout, first):
    monkeypatch.chdir(tmp_path)
    write_layout(layout, tmp_path / "set")
    assert count("set", "--data.classes", "cherry", "apple") == 0
    said, _, _, _, *rows = capsys.readouterr().out.splitlines()
    assert said == first
    assert [row.split()[0] for row in rows[:3]] == ["cherry", "apple", "all"]
    other = next(row.split()[3:] for row in rows if row.startswith("of other classes"))
    assert sum(map(int, other)) == 3  # bananas
    assert rows[-1] == "to train: doublehead train --data.root set --data.classes cherry apple"
