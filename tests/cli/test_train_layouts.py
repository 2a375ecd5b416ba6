"""`doublehead train --data.root DIR` for every layout: nothing else says what lies there."""

import json

import pytest

from doublehead.data.voc import VOC_CLASSES
from tests.support.engine_standin import one_thread, tiny_program  # noqa: F401  (a fixture of the module)
from tests.support.layouts import CLASSES, LAYOUTS, SINGLE, TRAIN, Sample, write_layout


def fast_program(monkeypatch):
    for module in ("pictures", "batch_sheet"):  # slow; nothing of them depends on the layout
        monkeypatch.setattr(f"doublehead.engine.{module}.save_picture", lambda *args: None)
    return tiny_program(monkeypatch)


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_steps_by_the_folder_alone(tmp_path, monkeypatch, capsys, name):
    root, out = write_layout(name, tmp_path / "set"), tmp_path / "run"
    program = fast_program(monkeypatch)
    arguments = ("--data.root", root, "--train.steps", "2", "--data.workers", "0", "--out", out)
    assert program(*arguments) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    family = {"x": "VOC", "v": "VOC", "c": "COCO", "y": "YOLO", "l": "LabelMe"}[name[0]]
    assert f"data     {family}" in said and f"classes  3: {', '.join(CLASSES)}" in said
    assert ("held out by seed 0" in said) is (name in SINGLE)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["step"] == 2 and list(metrics["classes"]) == list(CLASSES)
    assert ("voc" in metrics) is (family == "VOC")


def test_a_run_that_learns_all_of_voc_s_classes_goes_on(tmp_path, monkeypatch, capsys):
    """Earlier versions learned VOC's twenty where the data name only some of them."""
    apples = [Sample(s.name, s.width, s.height, tuple(("cat", box) for _, box in s.objects)) for s in TRAIN]
    root, out = write_layout("voc", tmp_path / "set", apples, apples), tmp_path / "run"
    program = fast_program(monkeypatch)
    options = ("--data.format", "voc", "--data.root", root, "--data.workers", "0", "--train.steps")
    with monkeypatch.context() as earlier:
        earlier.setattr("doublehead.data.voc._find_classes", lambda folders: list(VOC_CLASSES))
        assert program(*options, "1", "--train.eval-every", "0", "--out", out) == 0, capsys.readouterr().err
    assert program("--resume", out, "--train.steps", "2") == 0, capsys.readouterr().err
    assert "classes  20: aeroplane" in capsys.readouterr().out
    assert program(*options, "1", "--out", tmp_path / "new") == 0
    assert "classes  1: cat" in capsys.readouterr().out
