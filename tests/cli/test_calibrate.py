"""`doublehead calibrate`, and the commands that take the gate it stored."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

import doublehead
from doublehead.cli import detect, evaluate, export
from doublehead.cli.calibrate import main
from doublehead.data.shapes import ShapesDataset
from doublehead.engine.checkpoint import load_model, save_model
from doublehead.errors import UserError
from tests.support.analysis_detector import SIDE, save_detector
from tests.support.data_samples import CocoFolder, picture
from tests.support.gates import own_findings

TRIED = ("--gates", "0.2", "0.25", "0.3", "0.4")


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    return save_detector(tmp_path_factory.mktemp("runs") / "ext")


@pytest.fixture(scope="module")
def annotations(untouched):
    return own_findings(load_model(untouched).model, ShapesDataset("val", 4, SIDE))


@pytest.fixture
def run(untouched, annotations, tmp_path, monkeypatch):
    """The folder of an Ext that finds all there is on its data."""
    monkeypatch.setattr(ShapesDataset, "annotations", lambda _: annotations())
    return Path(shutil.copytree(untouched, tmp_path / "ext"))


def mistake(capsys, command, *arguments, code: int = 2) -> str:
    with pytest.raises(SystemExit) as stop:
        command([*map(str, arguments), "--device", "cpu"])
    shown = capsys.readouterr().err
    assert stop.value.code == code and len(shown.splitlines()) == 1
    return shown


def test_the_gate_is_stored_printed_and_used(run, tmp_path, capsys):
    main([str(run), *TRIED, "--most-loss", "15", "--device", "cpu"])
    shown = capsys.readouterr().out.splitlines()
    content = json.loads((run / "gate.json").read_text())
    assert shown[0] == f"{run}: tiny, on 4 images of shapes (val)" and shown[1].split() == [
        "gate",
        "survivors",
        "AP",
        "loss",
    ]
    rows = [line.split() for line in shown[2:7]]
    assert [row[0] for row in rows] == ["none", *TRIED[1:]]
    chosen = [row for row in rows if row[-1] == "*"]
    assert len(chosen) == 1 and float(chosen[0][0]) == content["gate"]
    assert chosen[0][1:5] == [
        f"{100 * content['survivors']:.1f}", "%", f"{100 * content['AP']['with']:.2f}", f"{content['loss']:.2f}"
    ]  # fmt: skip
    assert 0 < content["survivors"] < 1 and 0 <= content["loss"] <= 15 and content["most_loss"] == 15
    assert content["images"] == 4 and content["data"]["format"] == "shapes" and len(content["curve"]) == 5
    assert "note: its loss is measured on the images that chose it" in "\n".join(shown)
    assert "note: 4 images are few" in "\n".join(shown) and str(run / "gate.json") in shown[-1]

    numbers = {}
    for asked in ("calibrated", str(content["gate"])):
        path = tmp_path / f"{asked}.json"
        evaluate.main([str(run), "--ext-gate", asked, "--metrics", str(path), "--device", "cpu"])
        numbers[asked] = json.loads(path.read_text())
        line = f"calibrated gate {content['gate']:g}: {content['loss']:.2f} AP lost on 4 images of shapes (val)"
        assert (line in capsys.readouterr().out) == (asked == "calibrated")
    assert numbers["calibrated"] == numbers[str(content["gate"])]
    assert numbers["calibrated"]["AP"] == pytest.approx(content["AP"]["with"], abs=1e-6)
    assert numbers["calibrated"]["box_rois"]["share"] == content["survivors"]


@pytest.fixture
def gate(run, capsys):
    """The gate that the run's folder holds."""
    main([str(run), *TRIED, "--most-loss", "15", "--device", "cpu"])
    capsys.readouterr()
    return json.loads((run / "gate.json").read_text())["gate"]


def test_every_command_takes_the_stored_gate(run, gate, tmp_path, monkeypatch):
    file, found = tmp_path / "picture.png", {}
    picture(file, 96, 80)
    for asked in ("calibrated", str(gate), "0"):
        out = tmp_path / asked
        arguments = ["--out", str(out), "--score-threshold", "0.05", "--device", "cpu", "--ext-gate", asked]
        detect.main([str(run), str(file), *arguments])
        found[asked] = json.loads((out / "detections.json").read_text())["pictures"][0]["detections"]
    assert found["calibrated"] == found[str(gate)] != found["0"]

    predictor = doublehead.load(run, "cpu", ext_gate="calibrated")
    assert [len(predictor.predict(file, 0.05).boxes)] == [len(found["calibrated"])]
    exported = []
    monkeypatch.setattr("doublehead.exporting.onnx_file.check_installed", lambda: None)
    monkeypatch.setattr(
        "doublehead.exporting.program.DetectorProgram", lambda detector, *_, **__: exported.append(detector) or stop()
    )

    def stop():
        raise UserError("far enough")

    for call in (
        lambda: export.run(export.Options(str(run), str(tmp_path / "a.onnx"), ext_gate="calibrated")),
        lambda: predictor.export(tmp_path / "b.onnx"),
        lambda: predictor.export(tmp_path / "c.onnx", ext_gate=0.0),
        lambda: doublehead.load(run, "cpu").export(tmp_path / "d.onnx"),
    ):
        with pytest.raises(UserError, match="far enough"):
            call()
    assert [detector.readout.detection.ext_gate for detector in exported] == [gate, gate, 0.0, 0.0]


def test_read_outs_in_one_pass_take_it_too(run, gate, tmp_path):
    path = tmp_path / "metrics.json"
    evaluate.main(
        [str(run), "--readouts", "all", "--ext-gate", "calibrated", "--metrics", str(path), "--device", "cpu"]
    )
    each = json.loads(path.read_text())["readouts"]
    assert each["fused"]["detection"]["ext_gate"] == gate and each["fused"]["box_rois"]["share"] < 1


def test_held_out_images_measure_the_choice(run, capsys):
    main([str(run), *TRIED, "--most-loss", "15", "--held-out", "--device", "cpu"])
    content = json.loads((run / "gate.json").read_text())
    other = content["held_out"]
    assert (content["images"], other["images"]) == (2, 2) and other["gate"] == content["gate"]
    assert other["AP"] != content["AP"] and other["loss"] == 100 * (other["AP"]["without"] - other["AP"]["with"])
    shown = capsys.readouterr().out
    assert f"held out, 2 images: AP {100 * other['AP']['without']:.2f} without" in shown
    assert (f"{other['loss']:.2f} lost, more than the bound" in shown) == (other["loss"] > 15)


def test_a_gate_is_replaced_when_asked(run, gate, capsys):
    before = (run / "gate.json").read_bytes()
    assert f"{run / 'gate.json'}: exists: add --overwrite to replace it" in mistake(capsys, main, run)
    assert (run / "gate.json").read_bytes() == before
    main([str(run), "--gates", "0.15", "--most-loss", "50", "--overwrite", "--device", "cpu"])
    assert json.loads((run / "gate.json").read_text())["gate"] == 0.15


def test_gates_that_all_lose_too_much_leave_nothing(run, capsys):
    shown = mistake(capsys, main, run, "--gates", "0.6", "0.9", "--most-loss", "0.1", code=1)
    assert "the smallest gate, 0.6, loses" in shown and "more than --most-loss 0.1: nothing is written" in shown
    assert not (run / "gate.json").exists()


def test_mistakes_are_one_line(run, untouched, tmp_path, capsys):
    plain = save_detector(tmp_path / "plain", "double_head")
    model, recipe, *more = load_model(untouched)
    detection = dataclasses.replace(recipe.model.detection, readout="conv")
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, detection=detection))
    (tmp_path / "conv").mkdir()
    save_model(tmp_path / "conv" / "model.safetensors", model, recipe, *more)
    cases = {
        (
            plain,
        ): "its head is 'double_head', and a gate is for 'double_head_ext'; it skips RoIs without a gate, exactly",
        (tmp_path / "conv",): "a gate is for the read-out 'fused' with two classifiers, not for read-out 'conv'",
        (run, "--fusion", "none"): "with two classifiers, not for fusion 'none'",
        (tmp_path / "nowhere",): "nowhere: no such file",
        (run, "--most-loss", "-1"): "--most-loss is -1.0, AP points from 0 to 100 are accepted",
        (run, "--gates", "0.1", "1"): "--gates has 1, scores above 0 and below 1 are accepted",
    }
    for arguments, message in cases.items():
        assert message in mistake(capsys, main, *arguments)
    assert "gate.json: no such file; make it: doublehead calibrate" in mistake(
        capsys, evaluate.main, run, "--ext-gate", "calibrated"
    )
    picture(tmp_path / "p.png")
    asked = (plain, tmp_path / "p.png", "--out", tmp_path / "found", "--ext-gate", "0.2")
    assert "its head is 'double_head', and a gate" in mistake(capsys, detect.main, *asked)
    assert not (tmp_path / "found").exists()
    with pytest.raises(UserError, match="an exported program has the gate that it was exported with"):
        doublehead.load(tmp_path / "program.onnx", ext_gate=0.2)
    assert not [path for path in tmp_path.rglob("gate.json")]


def test_data_that_cannot_be_used_is_one_line(run, tmp_path, capsys):
    folder = CocoFolder(tmp_path / "coco")
    folder.config()
    splits = ("--data.root", folder.root, "--data.val-split", "val")
    assert "'cat'" in mistake(capsys, main, run, *splits)  # of other classes
    folder.content["annotations"], folder.content["categories"] = [], [{"id": 1, "name": "disc"}]
    folder.config()
    assert "has no object to find" in mistake(capsys, main, run, *splits)
    (tmp_path / "empty").mkdir()
    assert "empty" in mistake(capsys, main, run, "--data.root", tmp_path / "empty")
    assert not (run / "gate.json").exists()


def test_a_closed_folder_is_noticed_before_the_work(run, capsys, monkeypatch):
    monkeypatch.setattr("doublehead.engine.gate_file.os.access", lambda *_: False)  # root may write anywhere
    monkeypatch.setattr("doublehead.engine.gates.measure_gates", None)
    assert "gate.json: cannot be written: its folder is not writable" in mistake(capsys, main, run)
