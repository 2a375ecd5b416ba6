"""`analyze sliding-windows`: errors over pictures and seeds, differences of heads, the record, the first objects."""

import hashlib
import json
from statistics import stdev

import numpy as np
import pytest
import torch

from doublehead.analysis import sliding_windows, study, windows
from doublehead.analysis.readers import open_readers
from doublehead.config import DataConfig
from doublehead.data import build_dataset
from doublehead.ops import box_iou
from tests.support.analysis_detector import (  # noqa: F401 (a fixture)
    SIDE,
    analyze,
    few_windows,
    read_table,
    save_detector,
    windows_225,
)
from tests.support.engine_standin import one_thread  # noqa: F401 (a fixture)

pytestmark = pytest.mark.usefixtures("windows_225")
IMAGES = 3
BIN = "0.5"  # to 0.55: every picture has windows there


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [save_detector(folder / name) for name in ("one", "another")]


@pytest.fixture(scope="module")
def heads(runs):
    """Two heads from two seeds each."""
    return [f"{head}={run}:{head}" for run in runs for head in ("fc", "conv")]


@pytest.fixture(scope="module")
def result(heads, tmp_path_factory):
    before = windows.SIZES, windows.OFFSETS, windows.WINDOWS
    few_windows()
    out = tmp_path_factory.mktemp("result") / "out"
    assert analyze("sliding-windows", *heads, "--out", out, "--data.val-images", IMAGES) == 0
    windows.SIZES, windows.OFFSETS, windows.WINDOWS = before
    return out


@pytest.fixture
def measured(heads):
    """For each picture its number of objects and, of the windows in `BIN`, each reader's regressed IoUs `[4, K]`."""
    found = []
    readers = open_readers(heads, torch.device("cpu"), seeds=True)
    for image, target in dataset():
        drawn = windows.object_windows(image, target, 0)
        labels, boxes = target["labels"][drawn.objects], target["boxes"]
        mine = windows.iou_bins(drawn.ious) == round(float(BIN) * windows.BINS)
        ious = []
        for reader in readers:
            features = reader.features(image, boxes)
            moved = reader.read_all(features, reader.rois(features, drawn.boxes), labels, 4096).boxes
            ious.append(box_iou(features.into_image(moved)[:, None], boxes[drawn.objects][:, None])[mine, 0, 0])
        found.append((len(boxes), torch.stack(ious).double().numpy()))
    return found


def dataset():
    return build_dataset(DataConfig(val_images=IMAGES, image_size=SIDE), "val")


def row_of(result, ending="", **where):
    rows = read_table(result / f"sliding-windows{ending}.csv")
    (row,) = (row for row in rows if row["group"] == "all" and row["bin low"] == BIN and where.items() <= row.items())
    return row


def jackknife(pictures, number):
    """The standard error over pictures of `number`, a function of several pictures' IoUs `[4, K]` together."""
    left = np.array([
        number(np.concatenate([p for j, p in enumerate(pictures) if j != k], axis=1)) for k in range(len(pictures))
    ])  # fmt: skip
    return np.sqrt((len(left) - 1) / len(left) * ((left - left.mean()) ** 2).sum())


def test_a_head_of_two_seeds_has_their_mean_and_both_errors(result, measured):
    pictures = [ious for _, ious in measured]
    every = np.concatenate(pictures, axis=1)
    row = row_of(result, head="fc")
    assert int(row["windows"]) == every.shape[1] and row["seeds"] == "2"
    assert float(row["iou mean"]) == pytest.approx(every[[0, 2]].mean(), abs=1e-6)
    assert float(row["iou std"]) == pytest.approx(every[[0, 2]].std(), abs=1e-6)
    assert float(row["iou se seeds"]) == pytest.approx(stdev(every[[0, 2]].mean(1)) / 2**0.5, rel=1e-4)
    assert float(row["iou se"]) == pytest.approx(jackknife(pictures, lambda p: p[[0, 2]].mean()), rel=1e-4)


def test_a_difference_is_paired_by_window_and_seed(result, measured):
    pictures = [ious for _, ious in measured]
    by_seed = np.concatenate([p[[1, 3]] - p[[0, 2]] for p in pictures], axis=1).mean(1)
    row = row_of(result, "-differences", head="conv", minus="fc")
    assert float(row["iou difference"]) == pytest.approx(by_seed.mean(), abs=1e-6)
    assert float(row["iou se seeds"]) == pytest.approx(stdev(by_seed) / 2**0.5, rel=1e-4)
    expected = jackknife(pictures, lambda p: (p[[1, 3]] - p[[0, 2]]).mean())
    assert float(row["iou se"]) == pytest.approx(expected, rel=1e-4)


def test_an_empty_bin_has_no_numbers(result):
    rows = [row for row in read_table(result / "sliding-windows-differences.csv") if row["windows"] == "0"]
    assert rows and {row[name] for row in rows for name in row if " se" in name or "difference" in name} == {""}


def test_the_record_says_all_that_the_tables_say_and_how_it_was_made(result, runs, measured):
    record = json.loads((result / "sliding-windows.json").read_text())
    assert record["format"] == "doublehead figure 1" and record["figure"] == "sliding-windows"
    assert {"command", "version", "commit", "date", "machine"} <= record.keys() and record["seconds"] > 0
    objects = sum(count for count, _ in measured)
    assert record["data"] == {"name": dataset().name, "images": 3, "objects": objects, "windows_per_object": 225}
    file = runs[1] / "model.safetensors"
    assert record["heads"][3] == {
        "name": "conv", "checkpoint": str(runs[1]), "kind": "double_head_ext", "classes_from": ["conv"],
        "boxes_from": "conv", "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }  # fmt: skip
    assert list(record["tables"]) == ["sliding-windows", "sliding-windows-differences"]
    for name, table in record["tables"].items():
        rows = [["" if value is None else str(value) for value in row] for row in table["rows"]]
        assert [dict(zip(table["columns"], row, strict=True)) for row in rows] == read_table(result / f"{name}.csv")


@pytest.fixture
def no_pictures(monkeypatch):
    for name in ("draw", "draw_differences"):
        monkeypatch.setattr(sliding_windows, name, lambda path, *_: path.name)


def test_the_first_objects(runs, tmp_path, measured, no_pictures, capsys):
    enough = measured[0][0] + 1  # in the second picture
    command = ["sliding-windows", f"fc={runs[0]}:fc", "--out", tmp_path, "--data.val-images", 3, "--objects"]
    assert analyze(*command, enough) == 0
    record = json.loads((tmp_path / "sliding-windows.json").read_text())
    assert (record["data"]["images"], record["data"]["objects"]) == (2, measured[0][0] + measured[1][0])
    assert list(record["tables"]) == ["sliding-windows"]  # nothing to compare with
    row = row_of(tmp_path, head="fc")
    assert int(row["windows"]) == sum(ious.shape[1] for _, ious in measured[:2])
    assert analyze(*command, enough + 1) == 2
    assert "holds the results of other objects: give another --out" in capsys.readouterr().err
    assert analyze(*command, 0) == 2
    assert "--objects is 0, at least 1 is accepted" in capsys.readouterr().err


def test_how_many_images_have_so_many_objects():
    sizes = {7: torch.zeros(2), 3: torch.zeros(0), 9: torch.zeros(3), 1: torch.zeros(1)}
    found = {n: list(study.first_objects(sizes, n)) for n in (1, 2, 3, 5, 6, 99, None)}
    every = [7, 3, 9, 1]
    assert found == {1: [7], 2: [7], 3: [7, 3, 9], 5: [7, 3, 9], 6: every, 99: every, None: every}


@pytest.mark.parametrize(
    "heads, message",
    [
        (["fc={0}:fc", "fc={0}/model.safetensors:fc"], "fc: the same model is given twice"),
        (["fc={0}:fc", "fc={1}:fc", "{0}", "{0}"], "two heads have the name 'one'"),
        (["one={1}", "{0}"], "two heads have the name 'one'"),
    ],
)
def test_seeds_that_are_none(runs, tmp_path, capsys, heads, message):
    assert analyze("sliding-windows", *(head.format(*runs) for head in heads), "--out", tmp_path / "out") == 2
    shown = capsys.readouterr().err
    assert message in shown and len(shown.splitlines()) == 1


def test_heads_with_different_numbers_of_seeds_have_no_paired_difference(runs, tmp_path, no_pictures):
    heads = [f"fc={runs[0]}:fc", f"fc={runs[1]}:fc", f"conv={runs[0]}:conv", f"split={runs[0]}:split"]
    assert analyze("sliding-windows", *heads, "--out", tmp_path, "--data.val-images", 1) == 0
    differences = read_table(tmp_path / "sliding-windows-differences.csv")
    assert {(row["head"], row["minus"]) for row in differences} == {("split", "conv")}
