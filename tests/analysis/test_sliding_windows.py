"""`analyze sliding-windows`: the numbers of Figures 2 and 7, resuming, several processes, mistakes."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from doublehead.analysis import sliding_windows
from doublehead.analysis.moments import MomentTable
from doublehead.analysis.states import State, merge_states
from doublehead.analysis.windows import BINS
from doublehead.config import DataConfig, LossConfig
from doublehead.data import build_dataset
from doublehead.engine.checkpoint import load_model, save_model
from doublehead.engine.errors import UserError
from doublehead.ops import box_iou, clip_boxes, decode_boxes, fuse_scores
from tests.support.analysis_detector import (  # noqa: F401 (a fixture)
    SIDE,
    analyze,
    few_windows,
    read_table,
    real_models_few_windows,
    save_detector,
    stop_after,
    windows_225,
)
from tests.support.engine_standin import finish, free_port, launch, one_thread  # noqa: F401 (a fixture)

pytestmark = pytest.mark.usefixtures("windows_225")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    save_detector(folder / "ext")
    save_detector(folder / "conv", "conv")
    save_detector(folder / "two-classes", "fc", classes=("cat", "dog"))
    save_detector(folder / "untrained", loss=LossConfig(l_fc=1.0))
    return folder


@pytest.fixture(scope="module")
def result(runs, tmp_path_factory):
    """The results of one uninterrupted process."""
    from doublehead.analysis import windows

    before = windows.SIZES, windows.OFFSETS, windows.WINDOWS
    few_windows()
    out = tmp_path_factory.mktemp("result") / "out"
    assert analyze(*command(runs, out)) == 0
    windows.SIZES, windows.OFFSETS, windows.WINDOWS = before
    return out


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take seconds; `result` has them, for it is made before."""
    monkeypatch.setattr(sliding_windows, "draw", lambda path, *_: path.name)
    monkeypatch.setattr(sliding_windows, "draw_differences", lambda path, *_: path.name)


def changed_copy(run, folder, bias):
    loaded = load_model(run)
    with torch.no_grad():
        loaded.model.detector.heads["conv"].regressor.bias.fill_(bias)
    folder.mkdir()
    save_model(folder / "model.safetensors", *loaded)
    return folder


def command(runs, out, *more):
    heads = [f"{runs}/ext", f"fc={runs}/ext:fc", f"conv={runs}/ext/model.safetensors:conv", f"single conv={runs}/conv"]
    return ["sliding-windows", *heads, "--out", out, "--difficulty", runs / "ext", "--chunk", 300, *more]


def brute_force(checkpoint, classes, boxes):
    """Score, regressed box's IoU, window's IoU, class, box area of all windows, without a `Reader`."""
    from doublehead.analysis.windows import WINDOWS
    from doublehead.analysis.windows import sliding_windows as draw

    model = load_model(checkpoint).model
    detector, rows = model.detector, []
    for image, target in build_dataset(DataConfig(val_images=4, image_size=SIDE), "val"):
        with torch.no_grad():
            batch, _ = model.transform([image])
            maps = detector.backbone(batch.pixels)
            for k, (truth, label) in enumerate(zip(target["boxes"], target["labels"], strict=True)):
                windows = draw(target["boxes"], (SIDE, SIDE), (0, target["image_id"]))[k]
                rois = torch.cat((torch.zeros(WINDOWS, 1), windows / 2), 1)  # shown at half its size
                outputs = detector.heads(detector.roi_pooling(maps, rois))
                logits = [outputs[name].logits for name in classes]
                scores = fuse_scores(*logits, "complementary") if len(logits) == 2 else logits[0].softmax(-1)
                moved = decode_boxes(outputs[boxes].deltas[:, label], windows / 2, (10.0, 10.0, 5.0, 5.0))
                moved = clip_boxes(moved[None], batch.sizes)[0] * 2
                columns = scores[:, label], box_iou(moved, truth[None])[:, 0], box_iou(windows, truth[None])[:, 0]
                area = (truth[2] - truth[0]) * (truth[3] - truth[1])
                rows.append(torch.stack((*columns, label.expand(WINDOWS), area.expand(WINDOWS)), 1))
    return torch.cat(rows).double().numpy()


GROUPS = {
    "all": lambda label, area: area > 0,
    "small": lambda label, area: area < 32**2,
    "medium": lambda label, area: (area >= 32**2) & (area < 96**2),
    "large": lambda label, area: area >= 96**2,
    "easy classes": lambda label, area: np.isin(label, (2, 4)),
    "medium classes": lambda label, area: np.isin(label, (3, 6)),
    "hard classes": lambda label, area: np.isin(label, (1, 5)),
}


@pytest.mark.parametrize(
    "head, checkpoint, classes, boxes",
    [
        ("ext", "ext", ("fc", "conv"), "conv"),
        ("fc", "ext", ("fc",), "fc"),
        ("conv", "ext", ("conv",), "conv"),
    ],
)
def test_equal_to_brute_force(result, runs, head, checkpoint, classes, boxes):
    scores, moved, ious, label, area = brute_force(runs / checkpoint, classes, boxes).T
    rows = [row for row in read_table(result / "sliding-windows.csv") if row["head"] == head]
    assert [row["group"] for row in rows] == [group for group in GROUPS for _ in range(BINS)]
    for number, row in enumerate(rows):
        low, high = number % BINS / BINS, (number % BINS + 1) / BINS
        assert (float(row["bin low"]), float(row["bin high"])) == (low, high)
        mine = GROUPS[row["group"]](label, area) & (ious >= low) & ((ious < high) | (high == 1))
        assert abs(int(row["windows"]) - mine.sum()) <= 1  # an IoU on the edge of two bins
        if int(row["windows"]) == 0:
            assert row["score mean"] == row["score std"] == row["iou mean"] == row["iou std"] == ""
            continue
        if int(row["windows"]) == mine.sum():
            expected = [scores[mine].mean(), scores[mine].std(), moved[mine].mean(), moved[mine].std()]
            found = [float(row[name]) for name in ("score mean", "score std", "iou mean", "iou std")]
            assert found == pytest.approx(expected, abs=2e-5)
    assert sum(int(row["windows"]) for row in rows[:BINS]) == len(ious)
    assert scores.std() > 0.05 and moved.std() > 0.05  # it had something to say


def test_a_group_without_objects_is_a_gap_and_said(runs, tmp_path, capsys):
    assert analyze(*command(runs, tmp_path / "out", "--data.val-images", 1)) == 0
    shown = capsys.readouterr().out
    rows = read_table(tmp_path / "out" / "sliding-windows.csv")
    empty = {row["group"] for row in rows} - {row["group"] for row in rows if row["windows"] != "0"}
    assert "large" in empty
    assert all(f"{group}: no objects, so nothing is drawn" in shown for group in empty)
    assert "easy classes: square, ring" in shown and "RoIs/s" in shown and " 0 large" in shown


def test_the_figure_is_a_picture(result):
    picture = Image.open(result / "sliding-windows.png")
    assert picture.format == "PNG" and picture.width > 1500 and picture.height > 500
    endings = ("-differences.csv", "-differences.png", ".csv", ".json", ".png")
    assert sorted(p.name for p in result.iterdir()) == [*(f"sliding-windows{ending}" for ending in endings), "state"]


# ---------------------------------------------------------------------- resuming, processes


def same(a, b):
    return (a / "sliding-windows.csv").read_bytes() == (b / "sliding-windows.csv").read_bytes()


def state(out):
    (file,) = (out / "state" / "sliding-windows").iterdir()
    return json.loads(file.read_text())


def test_a_stopped_analysis_goes_on(result, runs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with stop_after(monkeypatch, sliding_windows, 2):
        analyze(*command(runs, out))
    assert not list(out.glob("sliding-windows*")) and state(out)["done"] == [1, 2]
    assert analyze(*command(runs, out)) == 0
    assert same(out, result) and state(out)["done"] == [1, 2, 3, 4]
    assert "2 of 4 images are done already" in capsys.readouterr().out
    monkeypatch.setattr(sliding_windows, "measure_image", None)  # nothing is left to measure
    (out / "sliding-windows.csv").unlink()
    assert analyze(*command(runs, out)) == 0
    assert same(out, result)


def test_two_processes_after_one_was_stopped(result, runs, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with stop_after(monkeypatch, sliding_windows, 1):
        analyze(*command(runs, out))
    port, log = free_port(), tmp_path / "log"
    arguments = [*command(runs, out), "--device", "cpu"]
    ranks = [launch("analyze", arguments, log, rank, 2, port, real_models_few_windows) for rank in range(2)]
    assert [finish(process) for process in ranks] == [0, 0], log.read_text()
    assert same(out, result) and state(out)["done"] == [1, 2, 3, 4]
    assert state(out)["table"] == state(result)["table"]
    images = build_dataset(DataConfig(val_images=4, image_size=SIDE), "val")
    rois = 4 * 225 * sum(len(images[i][1]["labels"]) for i in (1, 2, 3))  # each image on one process
    assert f"3 images, {rois:,} RoIs in" in log.read_text()
    assert log.read_text().count("RoIs/s") == 1 and "1 of 4 images are done" in log.read_text()


def test_files_of_a_merge_that_was_cut_short_count_once(result, tmp_path):
    folder = tmp_path / "state"
    shutil.copytree(result / "state" / "sliding-windows", folder)
    whole = json.loads((folder / "merged.json").read_text())
    empty = State(whole["fingerprint"], MomentTable(whole["table"]["shape"]))
    State(empty.fingerprint, MomentTable(empty.table.shape), {2, 4}).write(folder / "rank-1.json")
    assert merge_states(folder, empty, [1, 2, 3, 4, 5]).table.to_dict() == whole["table"]
    assert [path.name for path in folder.iterdir()] == ["merged.json"]
    State(empty.fingerprint, MomentTable(empty.table.shape), {4, 5}).write(folder / "rank-1.json")
    with pytest.raises(UserError, match="rank-1.json: holds images that another file holds too"):
        merge_states(folder, empty, [1, 2, 3, 4, 5])


@pytest.mark.parametrize(
    "change, message",
    [
        (["--seed", 1], "holds the results of other seed: give another --out"),
        (["--data.val-images", 3], "of other data: give"),
        (["--data.val-images", 3, "--seed", 1], "of other data and seed: give"),
    ],
)
def test_a_state_of_something_else_is_refused(result, runs, tmp_path, capsys, change, message):
    shutil.copytree(result, tmp_path / "out")
    assert analyze(*command(runs, tmp_path / "out", *change)) == 2
    assert message in capsys.readouterr().err and same(tmp_path / "out", result)


def test_a_head_of_the_same_name_but_other_weights_is_another(result, runs, tmp_path, capsys):
    shutil.copytree(result, tmp_path / "out")
    arguments = command(runs, tmp_path / "out")
    arguments[4] = f"single conv={changed_copy(runs / 'conv', tmp_path / 'other', 0.5)}"
    assert analyze(*arguments) == 2
    assert "of other heads" in capsys.readouterr().err


def test_a_damaged_state(result, runs, tmp_path, capsys):
    shutil.copytree(result, tmp_path / "out")
    (tmp_path / "out" / "state" / "sliding-windows" / "merged.json").write_text('{"done": [')
    assert analyze(*command(runs, tmp_path / "out")) == 2
    assert "merged.json: damaged: it is not JSON, or nested too deeply: remove" in capsys.readouterr().err


def test_other_groups_need_no_new_measurement(result, runs, tmp_path, monkeypatch):
    shutil.copytree(result, tmp_path / "out")
    monkeypatch.setattr(sliding_windows, "measure_image", None)
    arguments = [a for a in command(runs, tmp_path / "out") if a not in ("--difficulty", runs / "ext")]
    assert analyze(*arguments) == 0
    assert {row["group"] for row in read_table(tmp_path / "out" / "sliding-windows.csv")} == set(list(GROUPS)[:4])


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{runs}/conv:fc"], "'fc' needs head.kind 'double_head_ext', got 'conv'"),
        (["{runs}/untrained:fc"], "leave untrained"),
        (["{runs}/nowhere"], "nowhere: no such file"),
        (["{runs}/ext", "{runs}/two-classes"], "have different classes"),
        (["{runs}/two-classes"], "shapes: its classes are"),
        (["{runs}/ext", "{runs}/ext"], "two heads have the name 'ext'"),
        ([], "no head is named"),
        (["{runs}/ext", "--difficulty", "{runs}"], "metrics.json: cannot be read"),
        (["{runs}/ext", "--difficulty", "{runs}/ext/model.safetensors"], "not a metrics.json"),
        (["{runs}/ext", "--chunk", "0"], "--chunk is 0"),
        (["{runs}/ext", "--data.format", "coco"], "--data.format coco needs --data.root"),
        (["{runs}/ext", "--data.format", "coco", "--data.root", "{runs}/none"], "none: no such folder"),
        (["{runs}/ext", "--device", "cuda:99"], "cuda"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(runs, tmp_path, capsys, arguments, message):
    arguments = [text.format(runs=runs) for text in arguments]
    if "--device" in arguments:
        from doublehead.cli.analyze import main

        with pytest.raises(SystemExit) as stop:
            main(["sliding-windows", *arguments, "--out", str(tmp_path / "out")])
        assert stop.value.code == 2
    else:
        assert analyze("sliding-windows", *arguments, "--out", tmp_path / "out") == 2
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown and len(shown.splitlines()) == 1
    assert not list(tmp_path.rglob("*.csv")) and not list(tmp_path.rglob("*.json"))


def test_a_detector_that_gives_nan_is_refused(runs, tmp_path, capsys):
    loaded = load_model(runs / "conv")
    with torch.no_grad():  # weights that are finite, and logits that are not
        loaded.model.detector.heads["conv"].classifier.weight.mul_(1e38)
    (tmp_path / "bad").mkdir()
    save_model(tmp_path / "bad" / "model.safetensors", *loaded)
    bad = tmp_path / "bad"
    assert analyze("sliding-windows", bad, "--out", tmp_path / "out") == 2
    assert "bad: gives scores or boxes that are not finite" in capsys.readouterr().err
