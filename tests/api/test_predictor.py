"""`doublehead.load` and what it gives: the detections of `doublehead detect`, in three lines."""

import json
import re
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import doublehead
from doublehead.cli import detect
from doublehead.config import Recipe
from doublehead.engine.checkpoint import load_model
from doublehead.engine.evaluator import predict_images
from doublehead.errors import UserError
from doublehead.exporting import ExportedDetector
from doublehead.exporting.description import describe
from doublehead.exporting.program import DetectorProgram
from tests.support.detect_samples import many
from tests.support.engine_standin import one_thread  # noqa: F401 (a fixture)
from tests.support.export_samples import CLASSES, save_tiny_ext
from tests.support.tiny_detectors import tiny

PIXELS = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
CHW = torch.from_numpy(PIXELS).permute(2, 0, 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with a detector that finds something."""
    return save_tiny_ext(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def predictor(run):
    return doublehead.load(run, device="cpu")


def same(one, other):
    fields = ("boxes", "labels", "scores")
    return (
        len(one) > 0
        and one.size == other.size
        and all(torch.equal(getattr(one, name), getattr(other, name)) for name in fields)
    )


# ---------------------------------------------------------------------- detections


def test_files_give_what_the_command_finds(run, predictor, tmp_path):
    folder = many(tmp_path / "in", 2)
    detect.main([str(run), str(folder), "--out", str(tmp_path / "out"), "--device", "cpu", "--score-threshold", "0.3"])
    entries = json.loads((tmp_path / "out" / "detections.json").read_text())["pictures"]
    found = predictor.predict([entry["file"] for entry in entries], score_threshold=0.3)
    assert [d.to_list() for d in found] == [entry["detections"] for entry in entries]
    assert [d.size for d in found] == [(entry["height"], entry["width"]) for entry in entries]
    assert min(map(len, found)) > 0


def test_a_detection_that_scores_as_the_threshold_is_given(predictor):
    scores = predictor.predict(CHW, score_threshold=0).scores
    assert torch.equal(predictor.predict(CHW, score_threshold=scores[3].item()).scores, scores[:4])


def test_every_kind_of_image_gives_the_same(predictor, tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    expected = predictor.predict(CHW)
    for image in (PIXELS, Image.fromarray(PIXELS), tmp_path / "a.png", str(tmp_path / "a.png")):
        assert same(predictor(image), expected)
    (alone,) = predict_images(predictor.model, [CHW], torch.device("cpu"))
    keep = alone["scores"] >= 0.5
    assert 0 < keep.sum() < len(keep) and torch.equal(alone["boxes"][keep], expected.boxes)


def test_one_gives_one_and_several_a_list_in_which_none_depends_on_another(predictor):
    small = CHW[:, :40, :50]
    several = predictor.predict([CHW, small, CHW])
    assert [d.size for d in several] == [(64, 96), (40, 50), (64, 96)]
    assert same(several[0], predictor.predict(CHW)) and same(several[1], predictor.predict(small))
    assert all(map(same, predictor.predict(torch.stack([CHW, CHW])), several[::2]))
    assert len(predictor.predict(image for image in [PIXELS])) == 1 and predictor.predict([]) == []


def test_detections_are_ordinary_tensors(predictor):
    found = predictor.predict(CHW, score_threshold=0)
    found.boxes.mul_(2)
    assert not found.boxes.is_inference() and not found.boxes.requires_grad
    assert found.boxes.shape == (len(found), 4) and found.labels.dtype == torch.int64
    first, name = next(iter(found)), found.names[0]
    assert first.name == name == CLASSES[first.label - 1] and first.box == tuple(found.boxes[0].tolist())
    best = found[found.scores > found.scores[3]]
    assert len(best) == 3 and best.size == (64, 96) and len(found[:2]) == 2
    assert repr(best[:1]) == f"Detections(1 in 96x64: {name} {first.score:.2f})"
    assert not found[:0] and repr(found[:0]) == "Detections(0 in 96x64)"
    assert found["boxes"] is found.boxes and found["scores"] is found.scores and found["labels"] is found.labels
    with pytest.raises(TypeError, match=r"list\(detections\)\[0\]"):
        found[0]


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan"), "0.5", None, True])
def test_a_wrong_threshold_is_one_line(predictor, threshold):
    with pytest.raises(UserError, match=re.escape(f"score_threshold is {threshold!r}, a number from 0 to 1")):
        predictor.predict(CHW, score_threshold=threshold)


def test_a_model_in_training_mode_is_not_used_so_nor_changed(predictor):
    expected = predictor.predict(CHW)
    before = {name: value.clone() for name, value in predictor.model.state_dict().items()}
    predictor.model.train()
    try:
        assert same(predictor.predict(CHW), expected) and predictor.model.training
    finally:
        predictor.model.eval()
    assert all(torch.equal(value, before[name]) for name, value in predictor.model.state_dict().items())


def test_threads_share_a_predictor(run):
    fresh, results = doublehead.load(run, "cpu"), {}
    images = [CHW, CHW.flip(1), CHW[:, :40], CHW[:, :, :50]]
    threads = [threading.Thread(target=lambda i=i: results.update({i: fresh.predict(images[i])})) for i in range(4)]
    for step in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            step(thread)
    assert all(same(results[i], fresh.predict(images[i])) for i in range(4))


# ---------------------------------------------------------------------- drawing


def test_drawing_gives_a_picture_of_the_same_size(predictor, tmp_path):
    found = predictor.predict(CHW)
    drawn = predictor.draw(PIXELS, found)
    assert drawn.size == (96, 64) and drawn.mode == "RGB" and (np.asarray(drawn) != PIXELS).any()
    for image in (CHW, CHW / 255, Image.fromarray(PIXELS)):
        assert predictor.draw(image, found) == drawn
    assert (np.asarray(predictor.draw(PIXELS, found, score_threshold=1)) == PIXELS).all()


def test_drawing_refuses_what_does_not_belong_together(predictor):
    found = predictor.predict(CHW)
    with pytest.raises(UserError, match=r"image is 50x40 \(width x height\), the detections are of one of 96x64"):
        predictor.draw(CHW[:, :40, :50], found)
    with pytest.raises(TypeError, match="got list; draw takes one image and its own"):
        predictor.draw(CHW, [found])


# ---------------------------------------------------------------------- loading


def test_runs_and_files(run, predictor, tmp_path):
    assert predictor.classes == CLASSES and predictor.recipe.name == "tiny-ext" and predictor.exported is None
    assert not predictor.model.training and predictor.device == torch.device("cpu")
    assert repr(predictor) == f"Predictor({str(run)!r}: tiny-ext on cpu; 3 classes: cat, dog, bird)"
    (tmp_path / "best.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    assert same(doublehead.load(tmp_path / "best.safetensors").to("cpu").predict(CHW), predictor.predict(CHW))
    assert doublehead.load(str(run), torch.device("cpu")).classes == CLASSES


def test_what_holds_no_detector_is_one_line(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}}, "yolo.pt")
    torch.save({}, "model_final.pth")
    for name, content in {"a.jpg": b"\xff\xd8\xff\xe0", "a.onnx": b"nonsense", "a.pt2": b"nonsense", "b.txt": b"x",
                          "empty.safetensors": b""}.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    torch.save({}, "foreign.pt2")
    for path, message in {
        "nowhere": "nowhere: no such file",
        ".": "has no model.safetensors",
        "yolo.pt": "first make a model of it: doublehead convert yolo.pt FOLDER",
        "model_final.pth": "doublehead convert model_final.pth FOLDER",
        "a.jpg": "a picture, where",
        "a.onnx": "a.onnx: neither a package nor an ONNX file|pip install onnxruntime",
        "a.pt2": "a.pt2: neither a package nor an ONNX file|pip install onnxruntime",
        "foreign.pt2": "not a detector that `doublehead export` wrote",
        "b.txt": "not a safetensors file",
        "empty.safetensors": "an empty file",
        "shapes-ext": r"the name of a recipe: train it first, doublehead.train\('shapes-ext'\)",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            doublehead.load(path)
        assert "\n" not in str(error.value)
    with pytest.raises(TypeError, match="path is a LoadedModel: expected the path of a run"):
        doublehead.load(load_model(run))
    with pytest.raises(UserError, match="device 'gpu' is unknown: give auto, cpu, cuda or cuda:N"):
        doublehead.load(run, device="gpu")


# ---------------------------------------------------------------------- exported programs


@pytest.fixture
def exported(run, tmp_path, monkeypatch):
    """A function that gives a loaded program of `batch` images, as an export makes it, but not compiled."""

    def make(batch):
        program = DetectorProgram(load_model(run).model.detector)
        note = describe(
            "onnx", Recipe("tiny", model=tiny("double_head_ext")), CLASSES, [3, 5, 8], (batch, 3, 64, 96), "cpu"
        )
        detector = ExportedDetector(program, note, torch.device("cpu"))
        monkeypatch.setattr("doublehead.api.loading.load_exported", lambda path, device_index, precision: detector)
        return doublehead.load(tmp_path / "tiny.onnx")

    return make


def test_an_exported_program_predicts_what_the_run_does(exported, predictor):
    program, images = exported(2), [CHW, CHW.flip(1), CHW.flip(2)]
    assert program.model is None and program.recipe is None and program.exported.shape == (2, 64, 96)
    assert program.classes == CLASSES
    for one, other in zip(program.predict(images), predictor.predict(images), strict=True):
        assert len(one) == len(other) > 0 and one.names == other.names
        torch.testing.assert_close(one.boxes, other.boxes, atol=1e-3, rtol=1e-4)
    assert program.draw(CHW, program.predict(CHW)).size == (96, 64)


def test_an_exported_program_says_what_it_cannot_do(exported):
    program = exported(1)
    assert len(program.predict([PIXELS[:30], PIXELS])) == 2
    with pytest.raises(
        UserError, match="image of 64x96 .* becomes 64x96, and .*tiny.onnx takes up to 96x64: .*--height"
    ):
        program.predict(PIXELS.transpose(1, 0, 2))
    for call in (program.evaluate, lambda: program.to("cpu"), lambda: program.export("b.onnx")):
        with pytest.raises(UserError, match="is an exported program, which has no"):
            call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is not there")
def test_a_device_that_is_not_there_is_one_line(run, tmp_path):
    for path in (run, tmp_path / "tiny.onnx"):
        with pytest.raises(UserError, match="this PyTorch sees no CUDA device"):
            doublehead.load(path, device="cuda")
