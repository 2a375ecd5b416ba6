"""`doublehead train --data.root DIR` for every layout: nothing else says what lies there."""

import json

import pytest

from tests.support.engine_standin import one_thread, tiny_program  # noqa: F401  (a fixture of the module)
from tests.support.layouts import CLASSES, LAYOUTS, SINGLE, write_layout


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_steps_by_the_folder_alone(tmp_path, monkeypatch, capsys, name):
    root, out = write_layout(name, tmp_path / "set"), tmp_path / "run"
    program = tiny_program(monkeypatch)
    for module in ("pictures", "batch_sheet"):  # slow; nothing of them depends on the layout
        monkeypatch.setattr(f"doublehead.engine.{module}.save_picture", lambda *args: None)
    arguments = ("--data.root", root, "--train.steps", "2", "--data.workers", "0", "--out", out)
    assert program(*arguments) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    family = {"x": "VOC", "v": "VOC", "c": "COCO", "y": "YOLO", "l": "LabelMe"}[name[0]]
    assert f"data     {family}" in said and f"classes  3: {', '.join(CLASSES)}" in said
    assert ("held out by seed 0" in said) is (name in SINGLE)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["step"] == 2 and list(metrics["classes"]) == list(CLASSES)
    assert ("voc" in metrics) is (family == "VOC")
