"""Evaluation: pycocotools' numbers, VOC's, the same on one process and two."""

import contextlib
import dataclasses
import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from doublehead.cli.evaluate import EvaluationData, Options, data_config, main, set_readout
from doublehead.config import DataConfig, DetectionConfig
from doublehead.data import build_dataset
from doublehead.engine import checkpoint
from doublehead.engine.distributed import World
from doublehead.engine.errors import UserError
from doublehead.engine.evaluator import (
    COCO_NUMBERS,
    coco_results,
    evaluate,
    inference,
    predict,
)  # fmt: skip
from doublehead.engine.metrics_text import format_metrics
from doublehead.engine.voc_ap import voc_ap50
from doublehead.recipes import RECIPES
from tests.support.engine_standin import MemoryDataset, TinyDetector, finish, free_port, launch, one_thread, tiny_models  # noqa: F401 (a fixture)

# ---------------------------------------------------------------------- material


class Oracle(nn.Module):
    """Looks its detections up by an image's first pixels, which number the images."""

    def __init__(self, outputs: list[dict]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.outputs, self.batches = outputs, []

    def forward(self, images):
        assert not self.training and torch.is_inference_mode_enabled()
        self.batches.append(len(images))
        return [self.outputs[int(image[0, 0, 0])] for image in images]


def numbered_images(count):
    """Images of different sizes, each with its number in the first pixel."""
    images = [torch.zeros(3, 60 + 7 * (i % 3), 80 - 5 * (i % 4), dtype=torch.uint8) for i in range(count)]
    for i, image in enumerate(images):
        image[0, 0, 0] = i
    return images


def annotation(image, box, category=2, **more):
    return {"image_id": 10 * image + 7, "bbox": [float(v) for v in box], "category_id": category, **more}


def output(*detections):
    """Detections (x, y, w, h, label, score) as a model gives them."""
    rows = torch.tensor(detections, dtype=torch.float32).reshape(-1, 6)
    boxes = rows[:, :4].clone()
    boxes[:, 2:] += boxes[:, :2]
    return {"boxes": boxes, "labels": rows[:, 4].long(), "scores": rows[:, 5]}


def random_case(seed=0, images=12):
    """Ground truth with crowds and empty images, and detections: near it, doubled, elsewhere, of the wrong class."""
    rng = np.random.default_rng(seed)
    annotations, outputs = [], []
    for i in range(images):
        found = []
        for _ in range(rng.integers(0, 6) if i else 0):
            box = [*rng.uniform(0, 40, 2), *rng.uniform(4, 40, 2)]
            label = int(rng.integers(1, 4))
            crowd = int(rng.random() < 0.15)
            annotations.append(annotation(i, box, 3 * label - 1, iscrowd=crowd))
            for _ in range(rng.integers(0, 3)):
                moved = np.maximum(np.array(box) + rng.normal(0, rng.choice([0.5, 2.5]), 4), 0.5)
                other = label if rng.random() < 0.8 else label % 3 + 1
                found.append((*moved, other, rng.random()))
            found.append((*rng.uniform(0, 30, 4), label, rng.random() * 0.3))
        outputs.append(output(*found))
    return MemoryDataset(numbered_images(images), annotations, classes=4), Oracle(outputs)


def official(ground_truth, results, path, **params):
    """pycocotools as its users use it: from files."""
    (path / "gt.json").write_text(json.dumps(ground_truth))
    (path / "dt.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path / "gt.json"))
        evaluation = COCOeval(truth, truth.loadRes(str(path / "dt.json")), "bbox")
        for name, value in params.items():
            setattr(evaluation.params, name, value)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


# ---------------------------------------------------------------------- COCO's numbers


def test_numbers_are_those_of_pycocotools(tmp_path):
    dataset, model = random_case()
    metrics, results = evaluate(model, dataset)
    stats = official(dataset.coco_ground_truth(), results, tmp_path)
    assert 0.1 < metrics["AP"] < 0.9
    assert [-1 if metrics[name] is None else metrics[name] for name in COCO_NUMBERS] == stats.tolist()
    for name, category in zip(dataset.classes, dataset.category_ids, strict=True):
        stats = official(dataset.coco_ground_truth(), results, tmp_path, catIds=[category])
        expected = [None if value < 0 else pytest.approx(value) for value in stats[:2]]
        assert [metrics["classes"][name][key] for key in ("AP", "AP50")] == expected, name
    assert metrics["classes"]["d"] == {"AP": None, "AP50": None}  # no box of it anywhere
    assert metrics["images"] == 12 and metrics["detections"] == len(results)


def test_results_are_in_submission_format():
    dataset = MemoryDataset(numbered_images(2), [annotation(0, (1, 2, 10, 20))])
    outputs = {17: output((3, 4, 5, 6, 2, 0.5)), 7: output((1.5, 2, 10, 20, 1, 0.25), (0, 0, 1, 1, 2, 0.75))}
    assert coco_results(outputs, dataset) == [
        {"image_id": 7, "category_id": 2, "bbox": [1.5, 2, 10, 20], "score": 0.25},
        {"image_id": 7, "category_id": 5, "bbox": [0, 0, 1, 1], "score": 0.75},
        {"image_id": 17, "category_id": 5, "bbox": [3, 4, 5, 6], "score": 0.5},
    ]
    with pytest.raises(RuntimeError, match="1 images were never evaluated, the first with id 17"):
        coco_results({7: output()}, dataset)


def test_perfect_detections_and_none():
    annotations = [annotation(i, (5, 5, 20 + i, 30)) for i in range(3)]
    dataset = MemoryDataset(numbered_images(3), annotations)
    perfect = Oracle([output((5, 5, 20 + i, 30, 1, 0.9)) for i in range(3)])
    metrics, _ = evaluate(perfect, dataset, voc=True)
    assert metrics["AP"] == metrics["AP50"] == metrics["AR100"] == metrics["voc"]["mAP50"] == pytest.approx(1)
    assert metrics["APl"] is None
    metrics, results = evaluate(Oracle([output()] * 3), dataset, voc=True)
    assert metrics["AP"] == metrics["AR100"] == metrics["voc"]["mAP50"] == 0 and results == []


def test_finding_a_crowd_is_neither_right_nor_wrong():
    found = [output((5, 5, 20, 30, 1, 0.5), (40, 5, 10, 10, 1, 0.9))]
    crowd = [annotation(0, (5, 5, 20, 30)), annotation(0, (38, 0, 20, 20), iscrowd=1)]
    metrics, _ = evaluate(Oracle(found), MemoryDataset(numbered_images(1), crowd), voc=False)
    assert metrics["AP"] == pytest.approx(1)
    metrics, _ = evaluate(Oracle(found), MemoryDataset(numbered_images(1), crowd[:1]))
    assert metrics["AP"] < 0.6


def test_a_split_without_ground_truth_gives_results_alone():
    metrics, results = evaluate(Oracle([output((1, 1, 5, 5, 1, 0.5))]), MemoryDataset(numbered_images(1), []))
    assert metrics == {"images": 1, "detections": 1} and len(results) == 1
    assert "no ground truth" in format_metrics(metrics)


def test_images_go_through_alone_and_the_model_is_left_as_it_was():
    dataset, model = random_case()
    model.train()
    model.frozen = nn.BatchNorm2d(3).eval()
    evaluate(model, dataset)
    assert model.batches == [1] * 12
    assert model.training and not model.frozen.training
    with pytest.raises(KeyError), inference(model):
        raise KeyError
    assert model.training and not model.frozen.training


def test_the_table_shows_percent_and_what_is_unknown():
    dataset, model = random_case()
    metrics, _ = evaluate(model, dataset, voc=True)
    text = format_metrics(metrics)
    assert f"{100 * metrics['AP']:.1f}" in text and "VOC AP50" in text and "2010+" in text
    assert [line for line in text.splitlines() if line.startswith("d ")][0].split() == ["d", "-", "-", "-"]


# ---------------------------------------------------------------------- VOC's number


def voc_case():
    truth = {
        "categories": [{"id": 2, "name": "a"}, {"id": 5, "name": "b"}],
        "annotations": [
            annotation(0, (0, 0, 10, 10)),
            annotation(0, (20, 0, 10, 10)),
            annotation(0, (40, 0, 10, 10), ignore=1, iscrowd=1),
            annotation(1, (0, 0, 10, 10)),
        ],
    }
    rows = [  # image, box, score
        (0, (0, 0, 10, 10), 0.9),  # right
        (0, (1, 0, 10, 10), 0.8),  # the same object again: wrong
        (0, (41, 0, 10, 10), 0.7),  # difficult: neither
        (1, (0, 0, 10, 5), 0.6),  # IoU 0.5: right
        (1, (30, 30, 5, 5), 0.5),  # nothing there: wrong
        (0, (20, 0, 10, 4.9), 0.4),  # IoU 0.49: wrong
    ]
    return truth, [annotation(i, box, score=score) for i, box, score in rows]


def test_voc_ap_by_hand():
    # right, wrong, right, wrong, wrong: recalls 1/3, 1/3, 2/3, ... precisions 1, 1/2, 2/3, ...
    assert voc_ap50(*voc_case()) == {"a": pytest.approx(1 / 3 * 1 + 1 / 3 * 2 / 3), "b": None}


def test_voc_precision_is_made_monotone_over_the_whole_curve():
    truth, _ = voc_case()
    truth["annotations"] = [annotation(i, (0, 0, 10, 10)) for i in range(4)]
    hits = (0, 0, 1, 1, 1, 0, 1)  # right or wrong, by falling score
    rows = [annotation(sum(hits[:i]), (0, 0, 10, 10 if hit else 2), score=1 - i / 10) for i, hit in enumerate(hits)]
    assert voc_ap50(truth, rows)["a"] == pytest.approx(3 / 4 * 3 / 5 + 1 / 4 * 4 / 7)


def test_voc_mean_leaves_out_classes_without_boxes():
    truth, rows = voc_case()
    truth["annotations"].append(annotation(1, (50, 50, 5, 5), category=5))
    assert voc_ap50(truth, rows)["b"] == 0
    dataset = MemoryDataset(numbered_images(2), voc_case()[0]["annotations"])
    outputs = [output((0, 0, 10, 10, 1, 0.9), (20, 0, 10, 10, 1, 0.8)), output((0, 0, 10, 10, 1, 0.7))]
    assert evaluate(Oracle(outputs), dataset, voc=True)[0]["voc"] == {"mAP50": 1.0, "classes": {"a": 1.0, "b": None}}


# ---------------------------------------------------------------------- the command


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A model of generated shapes in a file."""
    monkeypatch.setitem(sys.modules, "doublehead.models", tiny_models())
    data = DataConfig(val_images=5, image_size=64, workers=0)
    dataset = build_dataset(data, "val")
    torch.manual_seed(2)
    path = tmp_path / "model.safetensors"
    recipe = dataclasses.replace(RECIPES["shapes-ext"], data=data)
    checkpoint.save_model(path, TinyDetector(7), recipe, dataset.classes, dataset.category_ids)
    return path


def test_two_processes_give_what_one_gives(saved, tmp_path):
    answers = []
    for size in (1, 2):
        out, port = tmp_path / f"results{size}.json", free_port()
        arguments = [saved, "--out", out, "--device", "cpu"]  # 5 images: the shares are not equal
        logs = [tmp_path / f"log{size}{rank}" for rank in range(size)]
        processes = [launch("evaluate", arguments, log, rank, size, port) for rank, log in enumerate(logs)]
        assert [finish(process) for process in processes] == [0] * size, logs[0].read_text()
        answers.append((out.read_bytes(), logs[0].read_text().replace(out.name, "")))
        assert "AP" in logs[0].read_text()
        assert all(not log.read_text() for log in logs[1:])  # the main process alone speaks
    assert answers[0] == answers[1]
    assert len({result["image_id"] for result in json.loads(answers[0][0])}) == 5


def test_each_process_takes_its_share_alone():
    dataset, model = random_case(images=5)
    shares = [set(predict(model, dataset, World(rank, 2))) for rank in range(2)]
    assert shares == [set(dataset.image_ids[0::2]), set(dataset.image_ids[1::2])]


def test_results_file_is_what_pycocotools_reads(saved, tmp_path, capsys):
    main([str(saved), "--out", str(tmp_path / "r.json"), "--data.val-images", "4", "--device", "cpu"])
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "r.json").read_text())
    assert len(results) == 4 * 6
    truth = build_dataset(DataConfig(val_images=4, image_size=64), "val").coco_ground_truth()
    stats = official(truth, results, tmp_path)
    lines = printed.splitlines()
    numbers = lines[1 + next(i for i, line in enumerate(lines) if "AR100" in line)]
    assert numbers.split() == ["-" if value < 0 else f"{100 * value:.1f}" for value in stats]
    assert "disc" in printed


def test_readout_and_fusion_reach_the_model():
    trained = DetectionConfig(readout="split", fusion="max")
    for readout, fusion, gate, expected in (
        ("fc", None, None, ("fc", "max", None)),
        (None, "average", None, ("fused", "average", None)),  # a fusion is for the fused read-out
        ("fused", "none", None, ("fused", "none", None)),
        (None, None, 0.01, ("split", "max", 0.01)),
    ):
        model = TinyDetector(3)
        set_readout("x", model, Options("x", readout=readout, fusion=fusion, ext_gate=gate), trained)
        assert model.readout == expected
    model = TinyDetector(3)
    set_readout("x", model, Options("x"), trained)
    assert not hasattr(model, "readout")


def test_the_home_folder_may_stand_before_the_data_of_training(tmp_path, monkeypatch):
    (tmp_path / "cells").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    trained = DataConfig(format="voc", root="~/cells")
    assert data_config(trained, EvaluationData()) == trained


def test_data_of_training_are_the_default(tmp_path):
    trained = DataConfig(format="voc", root=str(tmp_path), val_split="test", workers=3)
    assert data_config(trained, EvaluationData()) == trained
    given = EvaluationData(format="coco", root="elsewhere", val_split="minival")
    changed = dataclasses.replace(trained, format="coco", root="elsewhere", val_split="minival")
    assert data_config(trained, given) == changed
    assert data_config(trained, EvaluationData(format="shapes")).format == "shapes"
    with pytest.raises(UserError, match="--data.format coco needs --data.root"):
        data_config(trained, EvaluationData(format="coco"))
    with pytest.raises(UserError, match="--data.root is missing: the folder of the voc"):
        data_config(dataclasses.replace(trained, root=None), EvaluationData())
    with pytest.raises(UserError, match="/nowhere, is not here: give --data.root"):
        data_config(dataclasses.replace(trained, root="/nowhere"), EvaluationData())


def test_a_folder_is_read_though_training_was_on_drawn_pictures():
    trained = DataConfig(format="shapes", val_images=7)
    config = data_config(trained, EvaluationData(root="data/cells"))
    assert (config.format, config.root, config.val_images) == ("auto", "data/cells", None)
    assert data_config(trained, EvaluationData(root="data/cells", val_images=3)).val_images == 3
    named = data_config(trained, EvaluationData(root="data/cells", format="voc"))
    assert (named.format, named.val_images) == ("voc", None)
    with pytest.raises(UserError, match="draws its own pictures and would not read --data.root data/cells"):
        data_config(trained, EvaluationData(root="data/cells", format="shapes"))
    assert data_config(trained, EvaluationData()) == trained


def test_broken_records_can_be_left_out_by_the_same_short_option_as_in_training(saved, monkeypatch):
    seen = []
    monkeypatch.setattr("doublehead.cli.evaluate.run", seen.append)
    main([str(saved), "--on-bad-record", "skip"])
    assert seen[0].data.on_bad_record == "skip" and seen[0].checkpoint == str(saved)


def voc_folder(root, *names):
    """A Pascal VOC folder of one image with an object of each name."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    Image.new("RGB", (64, 48)).save(root / "JPEGImages" / "one.jpg")
    (root / "ImageSets" / "Main" / "val.txt").write_text("one\n")
    box = "<bndbox><xmin>5</xmin><ymin>5</ymin><xmax>40</xmax><ymax>30</ymax></bndbox>"
    objects = "".join(f"<object><name>{name}</name>{box}</object>" for name in names)
    size = "<size><width>64</width><height>48</height><depth>3</depth></size>"
    text = f"<annotation><filename>one.jpg</filename>{size}{objects}</annotation>"
    (root / "Annotations" / "one.xml").write_text(text)


def test_a_model_is_measured_on_its_own_classes_alone(saved, tmp_path, capsys):
    checkpoint.save_model(saved, TinyDetector(4), RECIPES["shapes-ext"], ["dog", "cow", "cat"], [1, 2, 3])
    assert "dog, cow, cat" in mistake(capsys, str(saved), "--device", "cpu")  # these are not the generated shapes
    voc = ["--data.format", "voc", "--data.root", str(tmp_path / "voc"), "--device", "cpu"]
    voc_folder(tmp_path / "voc", "cat", "dog")  # fewer classes than the model, in another order
    main([str(saved), *voc, "--out", str(tmp_path / "r.json")])
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines() if line.startswith(("dog ", "cow ", "cat "))]
    assert [row[0] for row in rows] == ["dog", "cow", "cat"] and rows[1] == ["cow", "-", "-", "-"]
    assert {result["category_id"] for result in json.loads((tmp_path / "r.json").read_text())} == {1, 2, 3}
    shutil.rmtree(tmp_path / "voc")
    voc_folder(tmp_path / "voc", "cat", "bird")
    shown = mistake(capsys, str(saved), *voc)
    assert "one.xml, object 2" in shown and "bird" in shown and "dog, cow, cat" in shown


def mistake(capsys, *arguments):
    """What the command says of a user's mistake."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and shown.startswith("error: ") and len(shown.splitlines()) == 1
    return shown


def test_mistakes_are_one_line(saved, tmp_path, capsys):
    assert mistake(capsys, "nowhere/model.safetensors") == "error: nowhere/model.safetensors: no such file\n"
    for out in (tmp_path, tmp_path / "absent" / "r.json"):  # told before the work, not after it
        assert f"--out {out}: cannot be written" in mistake(capsys, "nowhere", "--out", str(out))
    assert "--data.root" in mistake(capsys, str(saved), "--data.format", "voc", "--device", "cpu")
