"""`analyze pearson`: Figure 3's correlations, equal to NumPy's, and their gaps."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from doublehead.analysis import pearson, windows
from doublehead.analysis.groups import UNMATCHED
from doublehead.analysis.jackknife import Estimate, sample
from doublehead.analysis.moments import Moments
from doublehead.analysis.readers import open_readers
from doublehead.config import DataConfig
from doublehead.data import build_dataset
from doublehead.engine.checkpoint import load_model
from doublehead.ops import box_iou
from tests.support.analysis_detector import (  # noqa: F401
    SIDE,
    analyze,
    few_windows,
    read_table,
    save_detector,
    stop_after,
    windows_225,
)
from tests.support.engine_standin import one_thread  # noqa: F401 (a fixture)

FILES = ["pearson-differences.csv", "pearson.csv", "pearson.json", "pearson.png", "state"]
pytestmark = pytest.mark.usefixtures("windows_225")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_detector(tmp_path_factory.mktemp("runs") / "ext")


@pytest.fixture(scope="module")
def result(run, tmp_path_factory):
    before = windows.SIZES, windows.OFFSETS, windows.WINDOWS
    few_windows()
    out = tmp_path_factory.mktemp("result") / "out"
    assert analyze(*command(run, out)) == 0
    windows.SIZES, windows.OFFSETS, windows.WINDOWS = before
    return out


def command(run, out, *more):
    return ["pearson", f"fc={run}:fc", f"conv={run}:conv", "--out", out, "--difficulty", run, *more]


def brute_force(run, head, kind, background=False):
    """Score, IoU, class and object's area (None: no object) of every box of one kind, box by box."""
    model, rows = load_model(run).model, []
    model.set_readout(head)
    for image, target in build_dataset(DataConfig(val_images=4, image_size=SIDE), "val"):
        truth, labels = target["boxes"], target["labels"].tolist()
        areas = ((truth[:, 2] - truth[:, 0]) * (truth[:, 3] - truth[:, 1])).tolist()
        with torch.no_grad():
            if kind == "detections":
                found = model([image])[0]
                for box, score, label in zip(found["boxes"], found["scores"], found["labels"].tolist(), strict=True):
                    ious = [float(box_iou(box[None], truth[k, None])) * (labels[k] == label) for k in range(len(truth))]
                    best = int(np.argmax(ious))
                    rows.append((float(score), ious[best], label, areas[best] if ious[best] > 0 else None))
                continue
            batch, _ = model.transform([image])
            maps = model.detector.backbone(batch.pixels)
            if kind == "proposals":
                proposals, _ = model.detector.rpn(batch, maps)
                boxes = proposals.boxes[proposals.valid] * 2  # the model sees the image at half its size
                ious = box_iou(boxes, truth)
                owners = ious.argmax(1).tolist()
            else:
                boxes = windows.sliding_windows(truth, (SIDE, SIDE), (0, target["image_id"])).flatten(0, 1)
                ious = box_iou(boxes, truth)
                owners = [k for k in range(len(truth)) for _ in range(windows.WINDOWS)]
            rois = torch.cat((torch.zeros(len(boxes), 1), boxes / 2), 1)
            outputs = model.detector.heads(model.detector.roi_pooling(maps, rois))
            scores = outputs[head].logits.softmax(-1)
            rows += [
                (float(scores[i, labels[k]]), float(ious[i, k]), labels[k], areas[k])
                for i, k in enumerate(owners)
                if ious[i, k] > 0
            ]
            if background:
                best, label = scores[:, 1:].max(1)
                rows += [(float(best[i]), 0.0, int(label[i]) + 1, None) for i in range(len(boxes)) if not ious[i].any()]
    return rows


GROUPS = {
    "all": lambda label, area: True,
    "small": lambda label, area: area is not None and area < 32**2,
    "medium": lambda label, area: area is not None and 32**2 <= area < 96**2,
    "large": lambda label, area: area is not None and area >= 96**2,
    "easy classes": lambda label, area: area is not None and label in (2, 4),
    "medium classes": lambda label, area: area is not None and label in (3, 6),
    "hard classes": lambda label, area: area is not None and label in (1, 5),
}


@pytest.mark.parametrize("head", ["fc", "conv"])
@pytest.mark.parametrize("kind", pearson.KINDS)
def test_equal_to_brute_force(result, run, head, kind):
    pairs = brute_force(run, head, kind)
    assert len(pairs) > 20
    rows = [row for row in read_table(result / "pearson.csv") if (row["head"], row["boxes"]) == (head, kind)]
    assert [row["group"] for row in rows] == list(GROUPS)
    for row in rows:
        mine = [(score, iou) for score, iou, label, area in pairs if GROUPS[row["group"]](label, area)]
        assert int(row["pairs"]) == len(mine)
        if len(mine) < 3:
            assert row["pearson"] == ""
        else:
            assert float(row["pearson"]) == pytest.approx(np.corrcoef(np.array(mine).T)[0, 1], abs=1e-4)
    if kind == "detections":  # some belong to no object
        assert int(rows[0]["pairs"]) > sum(int(row["pairs"]) for row in rows[1:4]) > 0
    else:
        assert int(rows[0]["pairs"]) == sum(int(row["pairs"]) for row in rows[1:4])


def test_errors_are_over_pictures_and_differences_of_the_same_boxes(result):
    rows, differences = read_table(result / "pearson.csv"), read_table(result / "pearson-differences.csv")
    values = {(row["head"], row["boxes"], row["group"]): row["pearson"] for row in rows}
    assert len(differences) == len(rows) / 2 and {(row["head"], row["minus"]) for row in differences} == {
        ("conv", "fc")
    }
    for row in differences:
        conv, fc = (values[head, row["boxes"], row["group"]] for head in ("conv", "fc"))
        if "" in (conv, fc):
            assert row["difference"] == row["se"] == ""
        else:
            assert float(row["difference"]) == pytest.approx(float(conv) - float(fc), abs=1e-12)
    everything = [row for row in (*rows, *differences) if row["group"] == "all"]
    assert all(0 < float(row["se"]) < 1 and row["se seeds"] == "" and row["seeds"] == "1" for row in everything)
    record = json.loads((result / "pearson.json").read_text())
    assert list(record["tables"]) == ["pearson", "pearson-differences"] and record["background"] == "leave-out"
    assert len(record["tables"]["pearson"]["rows"]) == len(rows) and record["data"]["images"] == 4


def test_background_proposals_count_with_their_best_score_in_the_group_of_all(result, run, tmp_path):
    out = tmp_path / "out"
    assert analyze(*command(run, out, "--background", "include")) == 0
    ours, before = (read_table(folder / "pearson.csv") for folder in (out, result))
    changed = [(row["head"], row["boxes"], row["group"]) for row, old in zip(ours, before, strict=True) if row != old]
    assert changed == [("fc", "proposals", "all"), ("conv", "proposals", "all")]
    for row in ours:
        if row["boxes"] == "proposals" and row["group"] == "all":
            pairs = brute_force(run, row["head"], "proposals", background=True)
            assert int(row["pairs"]) == len(pairs) > sum(iou > 0 for _, iou, _, _ in pairs) > 0
            expected = np.corrcoef(np.array([pair[:2] for pair in pairs]).T)[0, 1]
            assert float(row["pearson"]) == pytest.approx(expected, abs=1e-4)
    assert (out / "pearson.png").read_bytes() != (result / "pearson.png").read_bytes()  # it says what it shows


def test_proposals_of_an_image_without_objects_are_background(run):
    reader = open_readers([f"{run}:fc"], torch.device("cpu"))[0]
    image = torch.randint(256, (3, SIDE, SIDE), generator=torch.manual_seed(0), dtype=torch.uint8)
    nothing = pearson.Objects(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    features = reader.features(image, nothing.boxes)
    assert len(pearson.proposal_pairs(reader, features, nothing, chunk=7).scores) == 0
    pairs = pearson.proposal_pairs(reader, features, nothing, chunk=7, background=True)
    assert len(pairs.scores) == len(reader.proposals(features)) > 7
    assert (pairs.scores > 0).all() and not pairs.ious.any() and (pairs.labels >= 1).all()


def test_the_figure_is_a_picture(result):
    picture = Image.open(result / "pearson.png")
    assert picture.format == "PNG" and picture.width > 1000
    assert sorted(path.name for path in result.iterdir()) == FILES


def test_a_stopped_analysis_goes_on(result, run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with stop_after(monkeypatch, pearson, 3):
        analyze(*command(run, out))
    assert analyze(*command(run, out)) == 0
    assert (out / "pearson.csv").read_bytes() == (result / "pearson.csv").read_bytes()
    shown = capsys.readouterr().out
    assert "3 of 4 images are done already" in shown and "large: no objects, so no bars" in shown
    (state,) = (out / "state" / "pearson").iterdir()
    assert json.loads(state.read_text())["done"] == [1, 2, 3, 4]


def test_detections_go_with_the_best_object_of_their_class():
    objects = pearson.Objects(
        torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8], [50, 50, 60, 60]]),
        torch.tensor([1, 2, 2]),
        torch.tensor([0, 1, 2]),
    )
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [50, 50, 60, 55], [50, 50, 60, 60], [80, 80, 90, 90]])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])
    found = {"boxes": boxes, "scores": scores, "labels": torch.tensor([1, 2, 2, 1, 2])}
    pairs = pearson.detection_pairs(found, objects)
    assert pairs.ious.tolist() == pytest.approx([1, 0.8, 0.5, 0, 0])
    assert pairs.sizes.tolist() == [0, 1, 2, UNMATCHED, UNMATCHED]
    assert pairs.labels is found["labels"] and pairs.scores is scores
    nothing = pearson.Objects(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    pairs = pearson.detection_pairs(found, nothing)
    assert pairs.ious.tolist() == [0] * 5 and pairs.sizes.tolist() == [UNMATCHED] * 5
    empty = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
    assert len(pearson.detection_pairs(empty, objects).scores) == 0


def test_few_or_constant_pairs_are_a_gap():
    two, flat, three = Moments(2, 3, 3, 5, 5, 5), Moments(5, 5, 15, 5, 55, 15), Moments(3, 6, 6, 14, 14, 14)
    assert two.pearson == 1
    bars = [pearson.correlate("h", "windows", "g", [sample([moments])]) for moments in (two, flat, three)]
    assert [bar.value for bar in bars] == [Estimate(), Estimate(), Estimate(pytest.approx(1))]
    lines = pearson.describe_gaps([*bars, pearson.correlate("h", "windows", "none", [sample([Moments()])])])
    assert lines == [
        "g: no bar for h's windows: too few pairs (2)",
        "g: no bar for h's windows: scores or IoUs do not vary (5)",
        "none: no objects, so no bars",
    ]


def test_gaps_and_negative_bars_are_drawn(tmp_path):
    bars = [
        pearson.Correlation(head, kind, group, 9, Estimate(None if group == "large" else value, 0.1), 1)
        for head, value in (("a", 0.5), ("b", -0.4))
        for kind in pearson.KINDS
        for group in ("all", "large")
    ]
    assert pearson.draw(tmp_path / "bars.png", bars, "a title", pearson.TITLES) == "bars.png"
    assert Image.open(tmp_path / "bars.png").width > 1000


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{run}/nowhere"], "nowhere: no such file"),
        ([], "no head is named"),
        (["{run}", "--difficulty", "{run}/model.safetensors"], "not a metrics.json"),
        (["{run}", "--data.format", "voc", "--data.root", "{run}/none"], "none: no such folder"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, capsys, arguments, message):
    assert analyze("pearson", *(text.format(run=run) for text in arguments), "--out", tmp_path / "out") == 2
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown and len(shown.splitlines()) == 1
