"""`evaluate --pictures`: charts and detections in a folder that has none of them, or nothing at all."""

import dataclasses
import hashlib
import sys

import pytest
import torch

from doublehead.cli.evaluate import main
from doublehead.config import DataConfig
from doublehead.data import build_dataset
from doublehead.engine import charts, pictures
from doublehead.engine.checkpoint import save_model
from doublehead.recipes import RECIPES
from tests.support.engine_standin import TinyDetector, one_thread, tiny_models  # noqa: F401 (a fixture)


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A model of generated shapes in a file."""
    monkeypatch.setitem(sys.modules, "doublehead.models", tiny_models())
    monkeypatch.chdir(tmp_path)
    data = DataConfig(val_images=3, image_size=64, workers=0)
    dataset = build_dataset(data, "val")
    torch.manual_seed(2)
    recipe = dataclasses.replace(RECIPES["shapes-ext"], data=data)
    save_model(tmp_path / "model.safetensors", TinyDetector(7), recipe, dataset.classes, dataset.category_ids)
    return "model.safetensors"


def evaluated(*arguments):
    try:
        main([*arguments, "--device", "cpu"])
    except SystemExit as stop:
        return stop.code
    return 0


def contents(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_it_draws_into_a_new_folder_and_names_the_files(saved, tmp_path, capsys):
    assert evaluated(saved, "--pictures", "seen") == 0
    names = ["pr_curves.png", "confusion.png", "scores.png", "detections.png"]
    said = capsys.readouterr().out
    assert f"seen: {', '.join(names)}\n" in said and "best F1 at IoU 0.5: " in said
    assert {path.name for path in (tmp_path / "seen").iterdir()} == set(names)


def test_what_is_there_is_kept_unless_told_otherwise(saved, tmp_path, capsys, monkeypatch):
    (tmp_path / "seen").mkdir()
    (tmp_path / "seen" / "scores.png").write_bytes(b"mine")
    (tmp_path / "file").write_bytes(b"")
    before = contents(tmp_path)
    for arguments, said in (
        (["--pictures", "seen"], "error: --pictures seen: has scores.png already: give another folder"),
        (["--pictures", "file"], "error: --pictures file: cannot be written: give a writable folder"),
        (["--pictures", "no/where"], "error: --pictures no/where: cannot be written: give a writable folder"),
        (["--pictures", "new", "--readouts", "all"], "error: --pictures shows one read-out: leave out --readouts"),
    ):
        assert evaluated(saved, *arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith(said) and error.count("\n") == 1
    assert contents(tmp_path) == before and not (tmp_path / "new").exists()
    monkeypatch.setattr(charts, "CHARTS", {"scores.png": lambda details, path, title: path.write_bytes(b"new")})
    assert evaluated(saved, "--pictures", "seen", "--overwrite") == 0
    assert (tmp_path / "seen" / "scores.png").read_bytes() == b"new"


def test_without_ground_truth_there_are_detections_alone(saved, tmp_path, capsys, monkeypatch):
    from doublehead.data import shapes

    headers = []
    real = pictures.detection_grid
    monkeypatch.setattr(pictures, "detection_grid", lambda *a, **more: headers.append(more) or real(*a, **more))
    monkeypatch.setattr(charts, "draw_charts", None)
    kinds = [kind for kind in vars(shapes).values() if isinstance(kind, type) and hasattr(kind, "annotations")]
    for kind in kinds:
        monkeypatch.setattr(kind, "annotations", lambda self: [])
    assert evaluated(saved, "--pictures", "seen") == 0
    assert [path.name for path in (tmp_path / "seen").iterdir()] == ["detections.png"]
    said = capsys.readouterr().out
    assert "seen: detections.png\n" in said and "no precision, confusion and scores to draw" in said
    assert headers == [{"threshold": 0.5}]
