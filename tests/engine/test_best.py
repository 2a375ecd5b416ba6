"""`best.safetensors`: the weights with the highest AP, whatever a run went through."""

import json
import shutil
import sys

import pytest
import safetensors.torch
import torch

from doublehead.cli import evaluate, train
from doublehead.engine import load_model, pictures, run
from tests.support.engine_standin import TINY, one_thread, tiny_models  # noqa: F401 (a fixture)

EVERY_3 = ["--train.eval-every", "3"]


@pytest.fixture
def tiny(monkeypatch):
    """`tiny(aps, arguments)`: train with these APs as the results of evaluations; the APs that were left over."""
    monkeypatch.setitem(sys.modules, "doublehead.models", tiny_models())
    monkeypatch.setattr(pictures, "draw_curves", lambda *args: None)

    def start(aps, *arguments):
        results = iter(aps)

        def evaluated(*args, **kwargs):
            if (ap := next(results)) == "stop":
                raise KeyboardInterrupt
            return {"AP": ap, "AP50": ap, "images": 3, "classes": {}}, [], None

        monkeypatch.setattr(run, "evaluate_in_detail", evaluated)
        monkeypatch.setattr(run, "draw_results", lambda *args: [])
        monkeypatch.setattr(run, "format_metrics", lambda metrics: "")
        train.main([str(argument) for argument in arguments])
        return list(results)

    return start


def header(folder):
    with safetensors.safe_open(folder / "best.safetensors", "pt") as file:
        return int(file.metadata()["step"]), float(file.metadata()["validation_ap"])


def best_in_metrics(folder):
    return json.loads((folder / "metrics.json").read_text()).get("best")


def weights(path):
    return torch.cat([tensor.flatten() for tensor in safetensors.torch.load_file(path).values()])


def test_the_highest_ap_is_kept_and_named(tiny, tmp_path, capsys):
    folder = tmp_path / "run"
    assert tiny([0.1, 0.3, None, 0.3], *TINY, *EVERY_3, "--out", folder) == []
    assert header(folder) == (6, 0.3)  # None is no AP, and the first of equals stays
    assert best_in_metrics(folder) == {"step": 6, "AP": 0.3}
    assert "best.safetensors is of step 6, AP 30.0" in capsys.readouterr().out
    assert load_model(folder / "best.safetensors").classes == load_model(folder).classes
    assert not torch.equal(weights(folder / "best.safetensors"), weights(folder / "model.safetensors"))
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("aps, options", [([0.2], []), ([None] * 4, EVERY_3)])
def test_without_evaluations_on_the_way_or_without_ap_there_is_no_best(tiny, tmp_path, aps, options):
    folder = tmp_path / "run"
    tiny(aps, *TINY, *options, "--out", folder)
    assert not (folder / "best.safetensors").exists() and best_in_metrics(folder) is None


def test_a_resumed_run_knows_its_best(tiny, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    tiny([0.1, 0.4, 0.2, 0.3], *TINY, *EVERY_3, "--out", whole)
    with pytest.raises(SystemExit):
        tiny([0.1, 0.4, "stop"], *TINY, *EVERY_3, "--out", folder)  # step 9 is saved, but not evaluated
    assert tiny([0.2, 0.3], "--resume", folder) == []
    assert header(folder) == header(whole) == (6, 0.4) and best_in_metrics(folder) == best_in_metrics(whole)
    assert torch.equal(weights(folder / "best.safetensors"), weights(whole / "best.safetensors"))


def test_killed_between_an_evaluation_and_the_log_it_measures_the_same_step_again(tiny, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    write, seen = run.RunLog.write, []

    def dies_at_the_second_evaluation(self, record):
        seen.append(1) if "AP" in record else None
        if len(seen) == 2:
            raise KeyboardInterrupt
        write(self, record)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(run.RunLog, "write", dies_at_the_second_evaluation)
        tiny([0.1, 0.4], *TINY, *EVERY_3, "--out", folder)
    assert header(folder) == (6, 0.4)
    tiny([0.35, 0.2, 0.3], "--resume", folder)  # on another machine it may be a little less
    assert header(folder) == (6, 0.35)


@pytest.mark.parametrize("damage", ["other images", "garbage", "another model"])
def test_what_cannot_be_compared_is_said_and_replaced(tiny, tmp_path, capsys, damage):
    folder = tmp_path / "run"
    with pytest.raises(SystemExit):
        tiny([0.9, "stop"], *TINY, *EVERY_3, "--out", folder)
    if damage == "garbage":
        (folder / "best.safetensors").write_bytes(b"no weights")
    if damage == "another model":
        shutil.copy(folder / "model.safetensors", folder / "best.safetensors")
    capsys.readouterr()
    more = ["--data.val-images", "2"] if damage == "other images" else []
    tiny([0.2, 0.3, 0.1], "--resume", folder, *more)
    said = capsys.readouterr().out
    assert ("measured on other validation images" if more else "not the best weights of a run, or damaged") in said
    assert header(folder) == (9, 0.3)


def test_its_path_can_be_evaluated(tiny, tmp_path, capsys):
    tiny([0.1, 0.3, 0.2, 0.2], *TINY, *EVERY_3, "--out", tmp_path / "run")
    evaluate.main([str(tmp_path / "run" / "best.safetensors"), "--data.workers", "0"])
    assert "AR100" in capsys.readouterr().out
