"""`doublehead analyze qualitative`: finds the telling objects, and says so where there are none."""

import csv
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from doublehead.analysis import qualitative
from doublehead.analysis.options import Qualitative
from doublehead.analysis.qualitative import (
    KINDS,
    Case,
    Cases,
    Verdict,
    differing,
    find_cases,
    judge,
    most_telling,
    open_ext,
)
from doublehead.analysis.qualitative_figure import draw_cases, origins_text, score_text, view_around
from doublehead.analysis.qualitative_proposals import Origin, find_origins
from doublehead.cli.analyze import main
from doublehead.engine.checkpoint import load_model, save_model
from doublehead.engine.evaluator import inference
from tests.support.analysis_commands import failure, saved
from tests.support.analysis_detector import stop_after
from tests.support.engine_standin import MemoryDataset, one_thread  # noqa: F401 (a fixture)

CPU = torch.device("cpu")
ONLY_FC, ONLY_CONV, FC_TWICE, CONV_TWICE = KINDS


def output(*rows):
    """Detections (x1, y1, x2, y2, label, score)."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return {"boxes": table[:, :4], "labels": table[:, 4].long(), "scores": table[:, 5]}


def judged(detections, *objects, threshold=0.5):
    table = torch.tensor(objects, dtype=torch.float32)
    verdicts = judge(output(*detections), table[:, :4], table[:, 4].long(), threshold)
    return [(v.outcome, *(None if x is None else round(x, 4) for x in v[1:])) for v in verdicts]


OBJECT = (0, 0, 100, 100, 1)


# ---------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    "detections, expected",
    [
        ([], ("missed", None, None)),
        ([(0, 0, 100, 90, 1, 0.9)], ("found", 0.9, None)),
        ([(0, 0, 100, 90, 1, 0.5)], ("found", 0.5, None)),
        ([(0, 0, 100, 90, 1, 0.4), (0, 0, 100, 80, 1, 0.3)], ("missed", 0.4, None)),
        ([(0, 0, 100, 90, 2, 0.9)], ("missed", None, None)),  # of another class
        ([(0, 0, 100, 49, 1, 0.9)], ("missed", None, None)),  # lies badly
        ([(0, 0, 100, 50, 1, 0.9)], ("found", 0.9, None)),
        ([(0, 0, 100, 90, 1, 0.9), (0, 60, 100, 100, 1, 0.6)], ("duplicate", 0.9, 0.6)),
        ([(0, 60, 100, 100, 1, 0.6), (0, 0, 100, 90, 1, 0.9), (50, 0, 100, 100, 1, 0.7)], ("duplicate", 0.9, 0.7)),
        ([(0, 0, 100, 90, 1, 0.9), (0, 60, 100, 100, 1, 0.4)], ("found", 0.9, None)),  # the second under the threshold
        ([(0, 0, 100, 90, 1, 0.9), (0, 75, 100, 100, 1, 0.8)], ("found", 0.9, None)),  # IoU 0.25: of something else
    ],
)
def test_what_became_of_one_object(detections, expected):
    assert judged(detections, OBJECT) == [expected]


def test_a_detection_belongs_to_the_object_on_which_it_lies_best():
    neighbour = (0, 20, 100, 120, 1)
    on_object = (0, 2, 100, 102, 1, 0.9)
    assert judged([on_object], OBJECT, neighbour) == [("found", 0.9, None), ("unclear", 0.9, None)]
    assert judged([on_object, (0, 22, 100, 122, 1, 0.8)], OBJECT, neighbour) == [
        ("found", 0.9, None),
        ("found", 0.8, None),
    ]
    assert judged([on_object], OBJECT, (*neighbour[:4], 2)) == [("found", 0.9, None), ("missed", None, None)]


def test_boxes_without_area_do_not_matter():
    assert judged([(5, 5, 5, 5, 1, 0.9)], (5, 5, 5, 5, 1), OBJECT) == [("missed", None, None)] * 2


def test_which_objects_are_cases():
    found, missed, double, unclear = (Verdict(w, 0.9) for w in ("found", "missed", "duplicate", "unclear"))
    conv = [missed, found, found, double, found, missed, missed, unclear, double]
    fc = [found, missed, double, found, found, missed, double, found, double]
    expected = [(ONLY_FC, 0), (ONLY_CONV, 1), (FC_TWICE, 2), (CONV_TWICE, 3)]
    assert differing({"conv": conv, "fc": fc, "Ext": fc}) == expected


def case(kind, image, mine, other, duplicate=None, number=0):
    verdicts = {kind.head: Verdict(kind.outcome, mine, duplicate), kind.other: Verdict(kind.other_outcome, other)}
    return Case(kind, image, number, 1, (0, 0, 1, 1), verdicts | {"Ext": Verdict("found", 0.9)}, {})


def test_the_most_telling_come_first_and_one_of_each_image():
    cases = [
        case(ONLY_FC, 0, 0.9, 0.4), case(ONLY_FC, 1, 0.8, None), case(ONLY_FC, 1, 0.7, None, number=1),
        case(ONLY_FC, 2, 0.6, 0.2), case(FC_TWICE, 0, 0.9, 0.9, 0.55), case(FC_TWICE, 3, 0.6, 0.9, 0.56),
    ]  # fmt: skip
    assert most_telling(cases, ONLY_FC, 9) == [cases[1], cases[0], cases[3]]
    assert most_telling(cases, ONLY_FC, 2) == [cases[1], cases[0]]
    assert most_telling(cases, FC_TWICE, 1) == [cases[5]]
    assert most_telling(cases, CONV_TWICE, 1) == []


# ---------------------------------------------------------------------- pictures


def test_a_small_image_is_shown_whole_and_of_a_large_one_the_object():
    assert view_around((10, 20, 40, 50), (128, 96)) == (0, 0, 128, 96)
    assert view_around((300, 200, 320, 210), (640, 480)) == (230, 125, 390, 285)
    assert view_around((0, 470, 50, 480), (640, 480)) == (0, 280, 200, 480)
    assert view_around((0, 0, 600, 400), (640, 480)) == (0, 0, 640, 480)


def test_the_line_below_a_picture():
    assert score_text(Verdict("missed", None), 0.123) == "no detection of it; 0.12 on the object's own box"
    assert score_text(Verdict("duplicate", 0.9, 0.61), 0.5) == "scores 0.90 and 0.61; 0.50 on the object's own box"
    assert score_text(Verdict("found", 0.9), None) == "score 0.90"


# ---------------------------------------------------------------------- the command

BOXES = [(20.0, 20.0, 40.0, 40.0), (100.0, 60.0, 50.0, 50.0)]


def pictures(count=5):
    """Two objects of class 1 on each image but the last."""
    images = [torch.full((3, 120, 160), 40 * i, dtype=torch.uint8) for i in range(count)]
    annotations = [
        {"image_id": 10 * i + 7, "bbox": list(box), "category_id": 2} for i in range(count - 1) for box in BOXES
    ]
    return MemoryDataset(images, annotations)


FIRST, SECOND = (20, 20, 60, 60, 1, 0.9), (100, 60, 150, 110, 1, 0.7)
POOR = (20, 44, 60, 60, 1, 0.6)  # a duplicate of the first
ANSWERS = {  # by image: conv, fc, Ext
    0: ((SECOND,), (FIRST, SECOND), (FIRST, SECOND)),
    1: ((FIRST, SECOND), (FIRST, SECOND, POOR), (FIRST, SECOND)),
    2: ((), (FIRST, SECOND), (FIRST,)),
    3: ((FIRST,), (FIRST,), (FIRST,)),
    4: ((FIRST,), (), ()),
}


@pytest.fixture
def staged(tmp_path, monkeypatch):
    """An Ext whose detections are `ANSWERS`, on `pictures`."""
    saved(tmp_path / "run")

    def detect(readers, image):
        return dict(
            zip(("conv", "fc", "Ext"), (output(*rows) for rows in ANSWERS[int(image[0, 0, 0]) // 40]), strict=True)
        )

    monkeypatch.setattr(qualitative, "detect", detect)
    monkeypatch.setattr(qualitative, "build_dataset", lambda *args, **more: pictures())
    return tmp_path / "run"


def table(out):
    with open(out / "qualitative.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_cases_are_listed_and_drawn(staged, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "qualitative-only-conv-finds.png").write_bytes(b"of an earlier call")
    main(["qualitative", str(staged), "--out", str(out), "--device", "cpu", "--cases", "1"])
    rows = table(out)
    assert [(row["kind"], row["image_id"], row["x1"], row["conv"], row["fc"], row["Ext"]) for row in rows] == [
        ("only-fc-finds", "7", "20.0", "missed", "found", "found"),
        ("fc-duplicates", "17", "20.0", "found", "duplicate", "found"),
        ("only-fc-finds", "27", "20.0", "missed", "found", "found"),
        ("only-fc-finds", "27", "100.0", "missed", "found", "missed"),
    ]
    assert [row["picture"] for row in rows] == [
        "qualitative-only-fc-finds.png",
        "qualitative-fc-duplicates.png",
        "",
        "",
    ]
    assert [row["conv_score"] for row in rows] == ["", str(output(FIRST)["scores"].item()), "", ""]
    assert float(rows[1]["fc_duplicate"]) == pytest.approx(0.6) and rows[0]["fc_duplicate"] == ""
    assert all(0 < float(row["fc_score_at_box"]) < 1 for row in rows) and rows[0]["class"] == "a"
    names = sorted(path.name for path in out.iterdir() if path.is_file())
    assert names == ["qualitative-fc-duplicates.png", "qualitative-only-fc-finds.png", "qualitative.csv"]
    assert min(Image.open(out / names[0]).size) > 400
    said = capsys.readouterr().out
    assert "The fc-head finds what the conv-head misses: 3 objects, 1 in" in said
    assert "The conv-head finds what the fc-head misses: no such object, no picture" in said


def test_a_stopped_search_goes_on(staged, tmp_path, monkeypatch, capsys):
    command = ["qualitative", str(staged), "--cases", "1", "--device", "cpu", "--out"]
    main([*command, str(tmp_path / "whole")])
    with stop_after(monkeypatch, qualitative, 2, "find_cases"):
        main([*command, str(tmp_path / "out")])
    assert not (tmp_path / "out" / "qualitative.csv").exists()
    main([*command, str(tmp_path / "out")])
    assert "2 of 5 images are done already" in capsys.readouterr().out
    files = [path.name for path in (tmp_path / "whole").iterdir() if path.is_file()]
    assert len(files) == 3
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in files)
    assert failure([*command, str(tmp_path / "out"), "--score-threshold", "0.6"], capsys).count("other score_threshold")


def test_cases_come_in_the_order_of_the_data(staged):
    readers = open_ext(Qualitative("", checkpoint=str(staged)), CPU)
    merged = Cases()
    for number in (3, 1, 0, 2, 4):
        part = Cases(find_cases(readers, number, *pictures()[number], 0.5))
        merged.merge(Cases.from_dict(json.loads(json.dumps(part.to_dict()))))
    assert [(case.image, case.object) for case in merged.sorted()] == [(0, 0), (1, 0), (2, 0), (2, 1)]
    assert merged.sorted()[1].kind is FC_TWICE


def test_read_outs_and_scores_are_the_models(tmp_path):
    saved(tmp_path / "run")
    readers = open_ext(Qualitative("", checkpoint=str(tmp_path / "run")), CPU)
    image = torch.randint(256, (3, 120, 160), generator=torch.manual_seed(0), dtype=torch.uint8)
    found = qualitative.detect(readers, image)
    model = load_model(tmp_path / "run").model
    for name, readout in (("conv", "conv"), ("fc", "fc"), ("Ext", "fused")):
        model.set_readout(readout)
        with inference(model):
            expected = model([image])[0]
        assert len(expected["boxes"]) and all((found[name][key] == expected[key]).all() for key in expected)
    boxes, labels = torch.tensor([[10.0, 10, 60, 60], [50, 20, 150, 100]]), torch.tensor([1, 2])
    scores = qualitative.scores_at_boxes(readers, image, boxes, labels)
    features = readers["fc"].features(image, boxes)
    rois = torch.cat((torch.zeros(2, 1), features.boxes), 1)
    with torch.no_grad():
        detector = readers["fc"].model.detector
        logits = detector.heads(detector.roi_pooling(features.maps, rois), {"fc"})["fc"].logits
    assert scores["fc"] == pytest.approx(logits.softmax(1)[[0, 1], labels].tolist()) and set(scores) == {"conv", "fc"}


def test_proposals_are_those_that_the_heads_detections_come_from(tmp_path):
    saved(tmp_path / "run")
    readers = open_ext(Qualitative("", checkpoint=str(tmp_path / "run")), CPU)
    image = torch.randint(256, (3, 120, 160), generator=torch.manual_seed(0), dtype=torch.uint8)
    target = {"boxes": torch.tensor([[20.0, 20, 60, 60]]), "labels": torch.tensor([1]), "image_id": 7}
    features = readers["fc"].features(image, target["boxes"])
    proposals = features.into_image(readers["fc"].proposals(features))
    for kind in (FC_TWICE, CONV_TWICE):
        found = qualitative.detect(readers, image)[kind.head]
        label = int(found["labels"][0])
        boxes = found["boxes"][found["labels"] == label][:4]
        one = replace(case(kind, 0, 0.9, 0.8, 0.6), label=label)
        origins = find_origins(readers, image, target, one, boxes)
        assert 0 < len(origins) <= len(boxes)
        for origin, box in zip(origins, boxes, strict=False):
            torch.testing.assert_close(origin.moved[kind.head], box, atol=0.01, rtol=0)
            assert (proposals - origin.proposal).abs().amax(1).min() < 1e-3
            assert set(origin.moved) == {"conv", "fc"} and not origin.moved["conv"].equal(origin.moved["fc"])
        far = find_origins(readers, image, target, one, boxes + 50)
        assert all((origin.moved[kind.head] - boxes - 50).abs().amax(1).min() <= 0.5 for origin in far)


def test_proposals_are_yellow_in_the_panels_of_both_heads():
    moved = {"conv": torch.tensor([20.0, 20, 58, 60]), "fc": torch.tensor([20.0, 44, 60, 60])}
    origins = [Origin(torch.tensor([18.0, 40, 64, 64]), moved)]
    outputs = {name: output(FIRST) for name in ("conv", "fc", "Ext")}
    one = replace(case(FC_TWICE, 1, 0.9, 0.9, 0.6), box=(20.0, 20, 60, 60), at_box={"conv": 0.7, "fc": 0.8})
    for kind, yellow in ((FC_TWICE, origins), (ONLY_FC, [])):
        figure = draw_cases(kind, [replace(one, kind=kind)], [outputs], [yellow], pictures(), 0.5)
        lines = [[patch.get_edgecolor() for patch in axes.patches] for axes in figure.axes]
        assert [colours.count((1, 1, 0, 1)) for colours in lines] == [0, len(yellow), len(yellow), 0]
        assert ("yellow" in figure.get_suptitle()) == bool(yellow)
    below = draw_cases(FC_TWICE, [one], [outputs], [origins], pictures(), 0.5).axes
    assert below[1].get_xlabel().endswith("\nIoU 0.42 → 0.95") and below[2].get_xlabel().endswith("\nIoU 0.42 → 0.40")
    assert origins_text(5 * origins, "fc", one.box).endswith(", 0.42 → 0.40, ...")


def test_only_duplicates_have_proposals(tmp_path):
    saved(tmp_path / "run")
    readers = open_ext(Qualitative("", checkpoint=str(tmp_path / "run")), CPU)
    image, target = pictures()[0]
    found = qualitative.detect(readers, image)["fc"]
    assert qualitative.origins(readers, image, target, case(ONLY_FC, 0, 0.9, 0.4), found, 0.5) == []


def test_mistakes_are_named_before_the_work(tmp_path, capsys):
    saved(tmp_path / "run")
    saved(tmp_path / "plain", "double_head")
    model, recipe, classes, ids = load_model(tmp_path / "run")
    (tmp_path / "l_conv").mkdir()
    loss, detection = replace(recipe.model.loss, l_conv=1.0), replace(recipe.model.detection, readout="split")
    recipe = replace(recipe, model=replace(recipe.model, loss=loss, detection=detection))
    save_model(tmp_path / "l_conv" / "model.safetensors", model, recipe, classes, ids)
    out = tmp_path / "out"
    cases = {
        (): "no checkpoint is named",
        (tmp_path / "nowhere",): "nowhere: no such file",
        (tmp_path / "plain",): "its head is 'double_head'",
        (tmp_path / "l_conv",): "needs the conv-head's classifier",
        (tmp_path / "run", "--cases", 0): "--cases is 0",
        (tmp_path / "run", "--score-threshold", 1.5): "--score-threshold is 1.5, a number from 0.05",
        (tmp_path / "run", "--score-threshold", 0.01): "below which this model detects nothing",
    }
    for arguments, message in cases.items():
        assert message in failure(["qualitative", *arguments, "--out", out, "--device", "cpu"], capsys)
    assert not out.exists()
