"""`doublehead detect`: whose results its folder holds, and input that is no picture: videos, streams, URLs."""

import hashlib
import json
import sys

import pytest
import torch
from PIL import Image

from doublehead.cli.detect import main
from doublehead.engine.picture_files import find_pictures
from tests.support.detect_samples import many, save_tiny_detector
from tests.support.engine_standin import TinyDetector, one_thread, tiny_models  # noqa: F401 (a fixture)

pytestmark = pytest.mark.filterwarnings("ignore:.*TorchCodec:DeprecationWarning")


@pytest.fixture
def saved(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "doublehead.models", tiny_models())
    monkeypatch.chdir(tmp_path)
    return save_tiny_detector(tmp_path / "run")


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (50, 40), (200, 30, 30)).save(path)
    return path


def detect(*arguments):
    try:
        main([*(str(a) for a in arguments), "--device", "cpu"])
    except SystemExit as stop:
        return stop.code
    return 0


def digests(folder):
    """Path -> digest of every file below the folder; folders have None."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        for path in folder.rglob("*")
    }


# ---------------------------------------------------------------------- whose results lie in --out


def test_a_folder_with_results_is_refused_before_the_work(saved, tmp_path, capsys, monkeypatch):
    first = picture(tmp_path / "first" / "a.png")
    out = tmp_path / "out"
    assert detect(saved, first, "--out", out) == 0
    content = json.loads((out / "detections.json").read_text())
    assert (content["checkpoint"], content["score_threshold"], content["not_done"]) == (str(saved), 0.5, [])
    before = digests(tmp_path)
    capsys.readouterr()
    monkeypatch.setattr("doublehead.engine.checkpoint.load_model", None)  # it would fail there
    whose = f"another call's results by {saved} (1 picture, the first {first})"
    for again in (picture(tmp_path / "first" / "a.png"), "elsewhere"):
        assert detect(saved, again, "--out", out) == 2
        said = f"error: --out {out}: holds {whose}: give another --out, or --overwrite to replace them\n"
        assert capsys.readouterr().err == said
    assert digests(tmp_path) == before


@pytest.mark.parametrize("text", ["{}", "[]", "[" * 5000, '{"pictures": 7}', '{"pictures": [7]}', "\udcff"])
def test_results_of_unknown_origin_are_refused_too(saved, tmp_path, capsys, text):
    picture(tmp_path / "a.png")
    (tmp_path / "detections.json").write_text(text, errors="surrogateescape")
    before = digests(tmp_path)
    assert detect(saved, tmp_path / "a.png", "--out", tmp_path) == 2
    assert "holds a detections.json of unknown origin: give another --out" in capsys.readouterr().err
    assert digests(tmp_path) == before


def test_results_of_an_earlier_version_are_named(saved, tmp_path, capsys):
    (tmp_path / "detections.json").write_text(json.dumps({"pictures": [{"file": "a.png"}, {"file": "b.png"}]}))
    assert detect(saved, "b.png", "--out", tmp_path) == 2
    assert "holds another call's results (2 pictures, the first a.png): give" in capsys.readouterr().err


def test_a_file_as_folder_is_named(saved, tmp_path, capsys):
    path = picture(tmp_path / "a.png")
    assert detect(saved, path, "--out", path) == 2
    assert capsys.readouterr().err == f"error: --out {path}: is a file: give a folder\n"


@pytest.mark.parametrize("arguments", [["none.png"], ["bad.png"], ["clip.mp4"], ["https://x.org/a.jpg"], ["bare"]])
@pytest.mark.parametrize("existing", [False, True])
def test_nothing_read_writes_nothing(saved, tmp_path, capsys, arguments, existing):
    (tmp_path / "bad.png").write_text("no picture")
    (tmp_path / "clip.mp4").write_bytes(b"video")
    (tmp_path / "bare").mkdir()
    if existing:
        (tmp_path / "deep" / "out").mkdir(parents=True)
    before = digests(tmp_path)
    assert detect(saved, *arguments, "--out", "deep/out") == 1
    assert digests(tmp_path) == before
    shown = capsys.readouterr()
    assert shown.out == "no picture was read, nothing is written\n" and "1 could not be read" in shown.err


def test_an_error_in_the_middle_keeps_what_is_done(saved, tmp_path, capsys, monkeypatch):
    find, seen = TinyDetector.detect, []

    def full(self, image):
        seen.append(image)
        if len(seen) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")
        return find(self, image)

    monkeypatch.setattr(TinyDetector, "detect", full)
    folder, out = many(tmp_path / "in"), tmp_path / "out"
    assert detect(saved, folder, "--out", out, "--threads", 1) == 2
    listed = [entry["picture"] for entry in json.loads((out / "detections.json").read_text())["pictures"]]
    assert listed and sorted(path.name for path in out.iterdir()) == sorted([*listed, "detections.json"])
    said = capsys.readouterr().err
    assert f"stopped by an error: {len(listed)} of 12 pictures are done and in {out / 'detections.json'}\n" in said


def test_a_stop_before_the_first_picture_leaves_no_folder(saved, tmp_path, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(TinyDetector, "detect", stop)
    assert detect(saved, picture(tmp_path / "a.png"), "--out", tmp_path / "out") == 130
    assert capsys.readouterr().err.endswith("stopped by Ctrl-C: no picture is done; the same command starts over\n")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------- what is no picture

FRAMES = "frames/%06d.jpg"
URLS = {
    "https://x.org/a.jpg": "a URL: download it first and name the file: curl -L -O https://x.org/a.jpg",
    "HTTP://x.org/a b.jpg?c=1": "a URL: download it first and name the file: curl -L -O 'HTTP://x.org/a b.jpg?c=1'",
    "https://x.org/v/clip.MP4?t=1": "a video's URL: download it (curl -L -O 'https://x.org/v/clip.MP4?t=1'), then make "
    f"pictures of it first: mkdir frames; ffmpeg -i clip.MP4 {FRAMES}",
    "rtsp://10.0.0.1:554/s": "a stream: make pictures of it first: mkdir frames; ffmpeg -i rtsp://10.0.0.1:554/s "
    f"-vf fps=1 {FRAMES}",
    "s3://bucket/a.png": "a URL: download it first and name the file: aws s3 cp s3://bucket/a.png .",
    "gs://bucket/a.png": "a URL: download it first and name the file: gcloud storage cp gs://bucket/a.png .",
    "file:///home/a.png": "a URL: give the path alone: /home/a.png",
    "hdfs://x/a.png": "a URL: download it first and name the file",
}  # fmt: skip


@pytest.mark.parametrize("url", URLS)
def test_a_url_is_named_with_what_to_do(tmp_path, url):
    found = find_pictures([url], tmp_path / "out")
    assert found == ([], [{"file": url, "error": URLS[url]}], [])


def test_videos_are_named_wherever_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "photos" / "a.png")
    for name in ("photos/my clip.MOV", "photos/deep/b.mp4", "photos/c.heic", "photos/d.HEIC", "films/e.webm"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    files, unreadable, notes = find_pictures(["photos", "films", "films/*", "films/e.webm", "no.mp4"], tmp_path / "out")
    assert [str(file) for file in files] == ["photos/a.png"]
    how = f"make pictures of it first: mkdir frames; ffmpeg -i films/e.webm {FRAMES}"
    assert [(entry["file"], entry["error"]) for entry in unreadable] == [
        ("films", f"no picture in this folder, but videos: {how}"),
        ("films/e.webm", f"a video: {how}"),
        ("no.mp4", "no such file, nor does a file match it as a pattern"),
    ]
    assert notes == [
        f"photos: 2 videos are left out: make pictures of it first: mkdir frames; ffmpeg -i photos/deep/b.mp4 {FRAMES}",
        "photos: 2 .heic are left out: make JPEG or PNG of them, or name them to try them",
    ]


def test_results_of_earlier_calls_are_no_input(saved, tmp_path, capsys):
    picture(tmp_path / "in" / "a.png")
    assert detect(saved, "in", "--out", "in/first") == 0
    picture(tmp_path / "in" / "first" / "own.png")
    capsys.readouterr()
    assert detect(saved, "in", "--out", "in/second") == 0
    said = "note: in: annotated pictures of earlier calls are left out (1, as in in/first)\n"
    assert said in capsys.readouterr().err
    listed = json.loads((tmp_path / "in" / "second" / "detections.json").read_text())["pictures"]
    assert [entry["file"] for entry in listed] == ["in/a.png", "in/first/own.png"]
    assert detect(saved, "in/second/a.jpg", "--out", "again") == 0  # named, it is one
    assert detect(saved, "in/second", "--out", "third") == 1
    assert "in/second: no picture in this folder but those that earlier calls annotated" in capsys.readouterr().err


def test_what_a_folder_holds_besides_is_a_note(saved, tmp_path, capsys):
    picture(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.mp4").touch()
    assert detect(saved, "in", "--out", "out") == 0
    assert capsys.readouterr().err.startswith("note: in: 1 video is left out: make pictures of it first: ")
