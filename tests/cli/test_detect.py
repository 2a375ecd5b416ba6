"""`doublehead detect`: finds its pictures, reports the unreadable, overwrites nothing."""

import errno
import json
import os
import re
import signal
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from doublehead import data
from doublehead.cli.detect import main
from doublehead.engine import checkpoint, pictures
from doublehead.engine.evaluator import predict_images
from doublehead.engine.picture_files import ENDINGS, find_pictures, output_names
from doublehead.engine.pictures import from_picture
from tests.support.detect_samples import CLASSES, many, save_tiny_detector
from tests.support.engine_standin import TinyDetector, one_thread, tiny_models  # noqa: F401 (a fixture)

pytestmark = pytest.mark.filterwarnings("ignore:.*TorchCodec:DeprecationWarning")


def picture(path, size=(50, 40), colour=(200, 30, 30), **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **more)
    return path


@pytest.fixture
def saved(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "doublehead.models", tiny_models())
    return save_tiny_detector(tmp_path / "run")


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
        files, unmatched, notes = find_pictures(names, leave_out=out)
        assert notes == []
        return [str(f) for f in files], [(entry["file"], entry["error"]) for entry in unmatched]

    assert found(".") == (["a.JPG", "b.png", "other/d.png", "sub/deep/c.webp"], [])
    assert found("b.png", "*.png", "./b.png") == (["b.png"], [])  # each once
    assert found("**/*.png") == (["b.png", "other/d.png"], [])
    assert found("notes.txt") == (["notes.txt"], [])  # named by hand: it is tried
    assert found("out/old.jpg") == (["out/old.jpg"], [])
    said = ["no such file, nor does a file match it as a pattern"] * 2
    said += ["no picture in this folder, nor below it; looked for are " + " ".join(sorted(ENDINGS))]
    assert found("nowhere.png", "*.gif", "bare") == (
        [],
        list(zip(("nowhere.png", "*.gif", "bare"), said, strict=True)),
    )


def test_a_name_with_brackets_is_a_file_first(tmp_path):
    path = picture(tmp_path / "a[1].png")
    assert find_pictures([str(path)], leave_out=tmp_path / "out") == ([path], [], [])


def test_no_two_pictures_share_a_name_and_no_input_is_overwritten(tmp_path):
    files = [tmp_path / name for name in ("x/a.png", "y/a.png", "y/A.jpg", "out/b.jpg", "z/b.png", "z/a-2.png")]
    names = output_names(files, tmp_path / "out")
    assert names == ["a.jpg", "a-2.jpg", "A-3.jpg", "b-2.jpg", "b-3.jpg", "a-2-2.jpg"]
    assert len({name.lower() for name in names}) == len(files)


# ---------------------------------------------------------------------- the command


def test_pictures_and_json_agree_with_the_model(saved, tmp_path):
    path = picture(tmp_path / "in" / "a.png", size=(200, 150))
    assert detect(saved, tmp_path / "in", "--out", tmp_path / "out", "--score-threshold", 0) == 0
    answer = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert answer["classes"] == CLASSES and answer["unreadable"] == []
    (entry,) = answer["pictures"]
    assert (entry["file"], entry["picture"], entry["width"], entry["height"]) == (str(path), "a.jpg", 200, 150)
    model = checkpoint.load_model(saved).model
    (expected,) = predict_images(model, [data.read_image(path, upright=True)], torch.device("cpu"))
    assert [d["box"] for d in entry["detections"]] == expected["boxes"].tolist()
    assert [d["score"] for d in entry["detections"]] == expected["scores"].tolist()
    assert [(d["class"], d["label"]) for d in entry["detections"]] == [("cat", 1), ("dog", 2)]
    drawn = np.array(Image.open(tmp_path / "out" / "a.jpg")).astype(int)
    assert drawn.shape == (150, 200, 3)
    assert (abs(drawn - (200, 30, 30)).sum(axis=2) > 100).sum() > 300  # boxes and names


def formerly(saved, path, threshold):
    """What detection was before it had threads: Pillow, one picture after the other."""
    with Image.open(path) as picture:
        picture = ImageOps.exif_transpose(picture).convert("RGB")
    (output,) = predict_images(checkpoint.load_model(saved).model, [from_picture(picture)], torch.device("cpu"))
    return picture.size, {name: values[output["scores"] >= threshold] for name, values in output.items()}


@pytest.mark.parametrize("more", [(), ("--batch-size", 2, "--threads", 3), ("--batch-size", 50)])
def test_the_same_as_one_after_the_other(saved, tmp_path, more):
    folder = many(tmp_path / "in")
    assert detect(saved, folder, "--out", tmp_path / "out", "--score-threshold", 0.3, *more) == 1
    answer = json.loads((tmp_path / "out" / "detections.json").read_text())
    names = sorted(path.name for path in folder.iterdir())
    assert [entry["file"] for entry in answer["pictures"]] == [str(folder / n) for n in names if "b" not in n[:-4]]
    assert [entry["file"] for entry in answer["unreadable"]] == [str(folder / n) for n in names if "b" in n[:-4]]
    assert len(answer["pictures"]) == 9 and len(answer["unreadable"]) == 3
    for entry in answer["pictures"]:
        size, expected = formerly(saved, entry["file"], 0.3)
        assert (entry["width"], entry["height"]) == size == Image.open(tmp_path / "out" / entry["picture"]).size
        for key, name in (("box", "boxes"), ("score", "scores"), ("label", "labels")):
            found = torch.tensor([d[key] for d in entry["detections"]]).reshape(expected[name].shape)
            torch.testing.assert_close(found, expected[name], atol=1e-4, rtol=1e-4, check_dtype=False)


def test_throughput_is_printed(saved, tmp_path, capsys):
    assert detect(saved, many(tmp_path / "in", 2), "--out", tmp_path / "out") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("2 pictures with")
    number = r"\d+\.\d"
    assert re.fullmatch(
        rf"{number} s, {number}+ pictures/s; at the same time: "
        rf"reading {number} s, model {number} s, drawing {number} s", lines[1]
    )  # fmt: skip


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_16_bits_are_close(saved, tmp_path, amp, monkeypatch):
    seen = []
    outputs = TinyDetector.outputs

    def watched(self, image):
        logits, boxes = outputs(self, image)
        seen.append(logits.dtype)
        return logits.float(), boxes.float()

    monkeypatch.setattr(TinyDetector, "outputs", watched)
    path = picture(tmp_path / "a.png")
    assert detect(saved, path, "--out", tmp_path / "out", "--score-threshold", 0, "--amp", amp) == 0
    (entry,) = json.loads((tmp_path / "out" / "detections.json").read_text())["pictures"]
    assert seen == [{"bf16": torch.bfloat16, "fp16": torch.float16}[amp]]
    expected = formerly(saved, path, 0)[1]["scores"]
    torch.testing.assert_close(torch.tensor([d["score"] for d in entry["detections"]]), expected, atol=2e-2, rtol=0)


def test_ctrl_c_stops_and_keeps_what_is_done(saved, tmp_path, capsys, monkeypatch):
    folder = many(tmp_path / "in")
    seen = []
    find = TinyDetector.detect

    def interrupted(self, image):
        seen.append(image)
        if len(seen) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return find(self, image)

    monkeypatch.setattr(TinyDetector, "detect", interrupted)
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)  # no thread of tqdm's own, whichever test comes first
    before = threading.active_count()
    assert detect(saved, folder, "--out", tmp_path / "out", "--threads", 1) == 130
    assert len(seen) == 6 and threading.active_count() == before
    answer = json.loads((tmp_path / "out" / "detections.json").read_text())
    done = [entry["file"] for entry in answer["pictures"]]
    results = tmp_path / "out" / "detections.json"
    said = f"stopped by Ctrl-C: {len(done)} of 12 pictures are done and in {results}; to start over, add --overwrite\n"
    assert capsys.readouterr().err.endswith(said)
    seen_by_json = {entry["file"] for entry in (*answer["pictures"], *answer["unreadable"])} | set(answer["not_done"])
    assert seen_by_json == {str(path) for path in folder.iterdir()} and answer["not_done"]
    assert {path.name for path in results.parent.iterdir()} == (
        {"detections.json"} | {entry["picture"] for entry in answer["pictures"]}
    )
    assert 1 <= len(done) <= 6 and done == sorted(done)
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix == ".tmp"]


def test_sigterm_stops_as_ctrl_c_does(saved, tmp_path, capsys, monkeypatch):
    folder = many(tmp_path / "in")
    find, seen = TinyDetector.detect, []

    def terminated(self, image):
        seen.append(image)
        if len(seen) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return find(self, image)

    monkeypatch.setattr(TinyDetector, "detect", terminated)
    handler = signal.getsignal(signal.SIGTERM)
    assert detect(saved, folder, "--out", tmp_path / "out", "--threads", 1) == 143
    assert signal.getsignal(signal.SIGTERM) == handler
    done = len(json.loads((tmp_path / "out" / "detections.json").read_text())["pictures"])
    assert f"stopped by SIGTERM: {done} of " in capsys.readouterr().err


def test_a_used_folder_holds_no_pictures_of_an_earlier_call(saved, tmp_path, capsys):
    first, second, out = tmp_path / "first", tmp_path / "second", tmp_path / "out"
    picture(first / "a.png"), picture(first / "b.png"), picture(second / "b.png")
    assert detect(saved, first, "--out", out) == 0
    (out / "notes.txt").write_text("mine")
    picture(out / "own.jpg")
    listed = json.loads((out / "detections.json").read_text())
    listed["pictures"] += [{"picture": name} for name in ("../first/a.png", str(first / "b.png"), 7, "notes.txt")]
    (out / "detections.json").write_text(json.dumps(listed))
    assert detect(saved, second, "--out", out, "--overwrite") == 0
    assert {path.name for path in out.iterdir()} == {"b.jpg", "notes.txt", "own.jpg", "detections.json"}
    assert {path.name for path in first.iterdir()} == {"a.png", "b.png"}
    assert f"1 annotated pictures of an earlier call removed from {out}" in capsys.readouterr().out
    (out / "detections.json").write_text("[" * 5000)
    assert detect(saved, second, "--out", out, "--overwrite") == 0


def test_no_other_file_in_the_folder_is_overwritten(saved, tmp_path):
    out = tmp_path / "out"
    own = picture(out / "a.jpg", colour=(1, 2, 3))
    before = own.read_bytes()
    picture(tmp_path / "in" / "a.png")
    for more in ((), ("--overwrite",)):  # the second time over the first one's
        assert detect(saved, tmp_path / "in", "--out", out, *more) == 0
        assert sorted(path.name for path in out.iterdir()) == ["a-2.jpg", "a.jpg", "detections.json"]
        assert own.read_bytes() == before


def test_names_and_files_that_no_folder_takes(saved, tmp_path, capsys):
    """A picture longer than a JPEG can be, names with no room for a number, earlier results that list nonsense."""
    out = tmp_path / "out"
    long = "z" * 251
    for name in ("wide.png", f"{long}.png", f"{long}.bmp"):
        picture(tmp_path / "in" / name, (66_000, 2) if name == "wide.png" else (20, 20))
    out.mkdir()
    (out / "detections.json").write_text(json.dumps({"pictures": [{"picture": "y" * 400 + ".jpg"}]}))
    assert detect(saved, tmp_path / "in", "--out", out, "--overwrite") == 0
    entries = json.loads((out / "detections.json").read_text())["pictures"]
    assert [entry["width"] for entry in entries] == [66_000, 20, 20]
    assert [entry["picture"] for entry in entries] == ["wide.jpg", f"{long}.jpg", f"{long[:249]}-2.jpg"]
    assert [Image.open(out / entry["picture"]).size for entry in entries] == [(65_500, 1), (20, 20), (20, 20)]
    capsys.readouterr()
    assert detect(saved, out, "", "--out", out, "--overwrite") == 1
    shown = capsys.readouterr().err
    assert f"{out}: the folder of the results (--out), whose pictures are left out" in shown
    assert "\n  '': no such file" in shown


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_results_that_cannot_be_written_are_named_before_the_work(saved, tmp_path, capsys, make):
    make(tmp_path / "detections.json")
    assert detect(saved, picture(tmp_path / "a.png"), "--out", tmp_path) == 2
    assert f"{tmp_path / 'detections.json'}: is not a regular file, so the results cannot" in capsys.readouterr().err


def test_where_nothing_is_read_earlier_results_stay(saved, tmp_path, capsys):
    out = tmp_path / "out"
    picture(tmp_path / "a.png")
    assert detect(saved, tmp_path / "a.png", "--out", out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert detect(saved, tmp_path / "mistyped.png", "x" * 5000, "--out", out, "--overwrite") == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    said = capsys.readouterr()
    assert (
        f"nothing is written: the results of an earlier call stay in {out}" in said.out
        and "2 could not be read" in said.err
    )


def test_videos_pipes_and_bombs_are_named(saved, tmp_path, capsys):
    folder = tmp_path / "in"
    picture(folder / "good.png")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "round.jpg").symlink_to(folder / "round.jpg")
    Image.new("1", (12_000, 12_000)).save(folder / "bomb.png")
    (tmp_path / "a.mp4").write_bytes(b"video")
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "b.MOV").write_bytes(b"video")
    arguments = [folder, tmp_path / "a.mp4", tmp_path / "videos", "--out", tmp_path / "out"]
    assert detect(saved, *arguments) == 1
    shown = capsys.readouterr().err
    for said in (
        "5 could not be read", "round.jpg: cannot read this image: Too many levels of symbolic links",
        "a.mp4: a video: make pictures of it first: mkdir frames; ffmpeg -i ",
        "videos: no picture in this folder, but videos: make pictures",
        "pipe.jpg: cannot read this image: it is a pipe",
        "bomb.png: the image has 12000x12000",
    ):  # fmt: skip
        assert said in shown, shown
    assert "DecompressionBomb" not in shown
    assert len(json.loads((tmp_path / "out" / "detections.json").read_text())["pictures"]) == 1
    assert detect(saved, folder / "good.png", "--out", tmp_path / "out2", "--max-pixels", 10) == 1
    assert "10 are accepted" in capsys.readouterr().err
    assert detect(saved, folder / "good.png", "--out", tmp_path / "out2", "--max-pixels", 0) == 2


def test_want_of_memory_is_no_fault_of_the_picture(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(data.images, "to_rgb", lambda *_: (_ for _ in ()).throw(MemoryError("out of memory")))
    with pytest.raises(MemoryError):
        detect(saved, picture(tmp_path / "a.png"), "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "detections.json").exists()


def test_a_full_gpu_is_explained(saved, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    monkeypatch.setattr(TinyDetector, "detect", full)
    assert detect(saved, picture(tmp_path / "a.png"), "--out", tmp_path / "out", "--batch-size", 4) == 2
    assert re.search("memory does not suffice for 1 pictures .*a.png: give a smaller --batch", capsys.readouterr().err)


def test_a_picture_that_cannot_be_saved_stops_the_command(saved, tmp_path, capsys, monkeypatch):
    def full(path, *_):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(pictures, "save_picture", full)
    assert detect(saved, many(tmp_path / "in"), "--out", tmp_path / "out") == 2
    assert "0.jpg: No space left on device" in capsys.readouterr().err


def test_only_a_few_pictures_are_under_way(saved, tmp_path, monkeypatch):
    """However many there are."""
    folder = tmp_path / "in"
    for number in range(60):
        picture(folder / f"{number:02}.png", size=(8, 8))
    under_way, most, lock = set(), [], threading.Lock()
    read, save = data.read_image, pictures.save_picture

    def reads(path, **options):
        with lock:
            under_way.add(path.stem)
            most.append(len(under_way))
        return read(path, **options)

    def saves(path, drawn):
        save(path, drawn)
        with lock:
            under_way.discard(path.stem)

    monkeypatch.setattr(data, "read_image", reads)
    monkeypatch.setattr(pictures, "save_picture", saves)
    assert detect(saved, folder, "--out", tmp_path / "out", "--threads", 2, "--batch-size", 3) == 0
    assert len(most) == 60 and max(most) <= (2 + 6 + 1) + (3 + 2 + 1) + 3  # reading, drawing, and a batch


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
    (tmp_path / "in" / "two\nlines\x1b.jpg").touch()
    assert detect(saved, tmp_path / "in", tmp_path / "none.png", "--out", tmp_path / "out") == 1
    answer = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [entry["file"] for entry in answer["pictures"]] == [str(good)]
    names = [entry["file"].rpartition("/")[2] for entry in answer["unreadable"]]
    assert names == ["none.png", "cut.jpg", "empty.png", "text.jpg", "two\nlines\x1b.jpg"]
    assert all(entry["error"] for entry in answer["unreadable"])
    shown = capsys.readouterr().err
    assert "5 could not be read" in shown and "Traceback" not in shown
    assert "/two\\nlines\\x1b.jpg: cannot read this image: an empty file" in shown and shown.count("two\\n") == 1
    assert "text.jpg: cannot read this image: its format or kind of pixels is unknown to Pillow" in shown
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["detections.json", "good.jpg"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--score-threshold": "1.5"}, "--score-threshold is 1.5, a number from 0 to 1"),
        ({"--out": "{tmp}/a.png/out"}, "cannot be made: Not a directory"),
        ({"checkpoint": "{tmp}/nowhere"}, "nowhere: no such file"),
        ({"--device": "gpu0"}, "device 'gpu0' is unknown"),
        ({"--batch-size": "0"}, "--batch-size is 0, at least 1 is accepted"),
        ({"--threads": "-1"}, "--threads is -1, 0 (half of the processors) or more"),
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
    monkeypatch.setattr(TinyDetector, "detect", lambda self, image: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main([str(saved), str(tmp_path / "a.png"), "--out", str(tmp_path / "out"), "--device", "cpu"])
