"""`doublehead detect` with an exported file in place of the checkpoint, and with --runtime openvino."""

import json

import pytest
import torch
from PIL import Image

from doublehead.cli import detect
from doublehead.config import Recipe
from doublehead.exporting import ExportedDetector
from doublehead.exporting.description import describe
from tests.support.tiny_detectors import tiny


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A file that opens as a program which finds one box in each image."""
    recipe = Recipe(name="tiny", model=tiny("fc"))
    note = describe("openvino", recipe, ["a", "b"], [1, 2], (1, 3, 64, 96), "cpu")

    def call(pixels, sizes):
        boxes, scores, labels = torch.zeros(1, 100, 4), torch.zeros(1, 100), torch.zeros(1, 100, dtype=torch.int64)
        boxes[0, 0], scores[0, 0], labels[0, 0] = torch.tensor([8.0, 8, 32, 32]), 0.9, 2
        return [boxes, scores, labels, torch.tensor([1])]

    opened = []

    def load(path, device_index=0, precision=None):
        opened.append((path, precision))
        return ExportedDetector(call, note, torch.device("cpu"))

    monkeypatch.setattr("doublehead.exporting.load", load)
    path = tmp_path / "a.xml"
    path.write_text("<net/>")
    path.with_suffix(".onnx").write_text("")
    for name, size in {"wide.png": (128, 64), "high.png": (64, 128)}.items():
        Image.new("RGB", size).save(tmp_path / name)
    load.opened = opened
    return path


def fails(*arguments):
    with pytest.raises(SystemExit) as stop:
        detect.main([str(argument) for argument in arguments])
    return stop.value.code


def test_an_exported_file_detects(program, tmp_path, capsys):
    detect.main([str(program), str(tmp_path / "wide.png"), "--out", str(tmp_path / "out")])
    (picture,) = json.loads((tmp_path / "out" / "detections.json").read_text())["pictures"]
    assert [found["class"] for found in picture["detections"]] == ["b"]
    assert picture["detections"][0]["box"] == pytest.approx([128 / 96 * 8, 64 / 48 * 8, 128 / 96 * 32, 64 / 48 * 32])
    assert "1 pictures with 1 detections" in capsys.readouterr().out


def test_a_picture_that_does_not_fit_is_reported(program, tmp_path, capsys):
    assert fails(program, tmp_path / "high.png", tmp_path / "wide.png", "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "high.png: a picture of 64x128 (width x height) becomes 48x96, and the program takes up to 96x64" in error
    written = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert len(written["pictures"]) == len(written["unreadable"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a.xml", "--batch-size", "2"), "--batch-size is 2, and a.xml takes 1 at a time"),
        (("a.onnx", "--runtime", "openvino"), "--runtime openvino: a.onnx is exported for another runtime"),
        (("a.xml", "--runtime", "torch"), "--runtime torch: a.xml is exported for another runtime"),
        (("B.XML", "--runtime", "torch"), "--runtime torch: B.XML is exported for another runtime"),
        (("none", "--runtime", "openvino", "--device", "cuda"), "cuda"),
        (("none", "--runtime", "openvino", "--amp", "fp16"), "--runtime openvino computes in fp32 or bf16"),
    ],
)
def test_mistakes_are_one_line(program, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "B.XML").touch()
    checkpoint, *options = arguments
    assert fails(checkpoint, "wide.png", "--out", "out", *options) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_openvino_that_is_missing_is_named(program, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("doublehead.exporting.openvino_file.NEEDED", ("no_such_package",))
    assert fails(tmp_path, tmp_path / "wide.png", "--out", tmp_path / "out", "--runtime", "openvino") == 2
    assert "needs no_such_package: pip install 'doublehead[openvino]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
