"""`python -m doublehead.detect`: finds its pictures, reports the unreadable, overwrites nothing."""

import json
import sys

import numpy as np
import pytest
import torch
from engine_standin import TinyDetector, one_thread, tiny_models  # noqa: F401 (a fixture)
from PIL import Image

from doublehead.detect import find_pictures, main, output_names, read_picture
from doublehead.engine import checkpoint
from doublehead.engine.evaluator import predict_images
from doublehead.engine.pictures import from_picture
from doublehead.recipes import RECIPES

CLASSES = ["cat", "dog"]


def picture(path, size=(50, 40), colour=(200, 30, 30), **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **more)
    return path


@pytest.fixture
def saved(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "doublehead.models", tiny_models())
    torch.manual_seed(0)
    folder = tmp_path / "run"
    folder.mkdir()
    model = TinyDetector(3)
    checkpoint.save_model(folder / "model.safetensors", model, RECIPES["shapes-ext"], CLASSES, [1, 2])
    return folder


def detect(*arguments):
    """The command's exit code."""
    try:
        main([*(str(a) for a in arguments), "--device", "cpu"])
    except SystemExit as stop:
        return stop.code
    return 0


# ---------------------------------------------------------------------- input and output names


def test_files_folders_and_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.png", "a.JPG", "sub/deep/c.webp", "other/d.png", "out/old.jpg"):
        picture(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "bare").mkdir()
    out = tmp_path / "out"

    def found(*names):
        files, unmatched = find_pictures(names, leave_out=out)
        return [str(f) for f in files], [(entry["file"], entry["error"]) for entry in unmatched]

    assert found(".") == (["a.JPG", "b.png", "other/d.png", "sub/deep/c.webp"], [])
    assert found("b.png", "*.png", "./b.png") == (["b.png"], [])  # each once
    assert found("**/*.png") == (["b.png", "other/d.png"], [])
    assert found("notes.txt") == (["notes.txt"], [])  # named by hand: it is tried
    assert found("out/old.jpg") == (["out/old.jpg"], [])
    assert found("nowhere.png", "*.gif", "bare") == (
        [],
        [("nowhere.png", "no such file"), ("*.gif", "no such file"), ("bare", "no picture in this folder")],
    )


def test_a_name_with_brackets_is_a_file_first(tmp_path):
    path = picture(tmp_path / "a[1].png")
    assert find_pictures([str(path)], leave_out=tmp_path / "out") == ([path], [])


def test_no_two_pictures_share_a_name_and_no_input_is_overwritten(tmp_path):
    files = [tmp_path / name for name in ("x/a.png", "y/a.png", "y/A.jpg", "out/b.jpg", "z/b.png", "z/a-2.png")]
    names = output_names(files, tmp_path / "out")
    assert names == ["a.jpg", "a-2.jpg", "A-3.jpg", "b-2.jpg", "b-3.jpg", "a-2-2.jpg"]
    assert len({name.lower() for name in names}) == len(files)


def test_pictures_are_read_upright_and_in_colour(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture(tmp_path / "turned.jpg", size=(50, 40), exif=exif)
    assert read_picture(tmp_path / "turned.jpg").size == (40, 50)
    for mode in ("L", "RGBA", "P", "CMYK"):
        Image.new(mode, (8, 6)).save(tmp_path / f"{mode}.tif")
        assert from_picture(read_picture(tmp_path / f"{mode}.tif")).shape == (3, 6, 8)


# ---------------------------------------------------------------------- the command


def test_pictures_and_json_agree_with_the_model(saved, tmp_path):
    path = picture(tmp_path / "in" / "a.png", size=(200, 150))
    assert detect(saved, tmp_path / "in", "--out", tmp_path / "out", "--score-threshold", 0) == 0
    answer = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert answer["classes"] == CLASSES and answer["unreadable"] == []
    (entry,) = answer["pictures"]
    assert (entry["file"], entry["picture"], entry["width"], entry["height"]) == (str(path), "a.jpg", 200, 150)
    model = checkpoint.load_model(saved).model
    (expected,) = predict_images(model, [from_picture(read_picture(path))], torch.device("cpu"))
    assert [d["box"] for d in entry["detections"]] == expected["boxes"].tolist()
    assert [d["score"] for d in entry["detections"]] == expected["scores"].tolist()
    assert [(d["class"], d["label"]) for d in entry["detections"]] == [("cat", 1), ("dog", 2)]
    drawn = np.array(Image.open(tmp_path / "out" / "a.jpg")).astype(int)
    assert drawn.shape == (150, 200, 3)
    assert (abs(drawn - (200, 30, 30)).sum(axis=2) > 100).sum() > 300  # boxes and names


def test_the_threshold_holds_for_picture_and_json(saved, tmp_path):
    picture(tmp_path / "a.png")
    assert detect(saved, tmp_path / "a.png", "--out", tmp_path / "out", "--score-threshold", 1) == 0
    (entry,) = json.loads((tmp_path / "out" / "detections.json").read_text())["pictures"]
    assert entry["detections"] == []
    assert abs(np.array(Image.open(tmp_path / "out" / "a.jpg")).astype(int) - (200, 30, 30)).max() < 8


def test_unreadable_pictures_are_reported_and_the_rest_is_done(saved, tmp_path, capsys):
    good = picture(tmp_path / "in" / "good.png")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (90, 90, 3), dtype=np.uint8)).save(tmp_path / "in" / "cut.jpg")
    whole = (tmp_path / "in" / "cut.jpg").read_bytes()
    (tmp_path / "in" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "in" / "empty.png").touch()
    (tmp_path / "in" / "text.jpg").write_text("not a picture")
    assert detect(saved, tmp_path / "in", tmp_path / "none.png", "--out", tmp_path / "out") == 1
    answer = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [entry["file"] for entry in answer["pictures"]] == [str(good)]
    names = [entry["file"].rpartition("/")[2] for entry in answer["unreadable"]]
    assert names == ["none.png", "cut.jpg", "empty.png", "text.jpg"]
    assert all(entry["error"] for entry in answer["unreadable"])
    shown = capsys.readouterr().err
    assert "4 could not be read" in shown and "text.jpg: cannot identify" in shown and "Traceback" not in shown
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["detections.json", "good.jpg"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--score-threshold": "1.5"}, "--score-threshold is 1.5, a number from 0 to 1"),
        ({"--out": "{tmp}/a.png/out"}, "cannot be made: Not a directory"),
        ({"checkpoint": "{tmp}/nowhere"}, "nowhere: no such file"),
        ({"--device": "gpu0"}, "device 'gpu0' is unknown"),
    ],
)
def test_mistakes_are_one_line(saved, tmp_path, capsys, change, message):
    picture(tmp_path / "a.png")
    options = {"checkpoint": str(saved), "--out": str(tmp_path / "out"), "--device": "cpu"} | change
    checkpoint_path, *rest = (str(value).format(tmp=tmp_path) for value in options.values())
    flags = [text for pair in zip(list(options)[1:], rest, strict=True) for text in pair]
    with pytest.raises(SystemExit) as stop:
        main([checkpoint_path, str(tmp_path / "a.png"), *flags])
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown and len(shown.splitlines()) == 1


def test_no_picture_at_all_is_a_mistake(saved, tmp_path, capsys):
    assert detect(saved, "--out", tmp_path / "out") == 2
    assert "no picture is named" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(saved, tmp_path, monkeypatch):
    picture(tmp_path / "a.png")
    monkeypatch.setattr(TinyDetector, "_detect", lambda self, image: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main([str(saved), str(tmp_path / "a.png"), "--out", str(tmp_path / "out"), "--device", "cpu"])
