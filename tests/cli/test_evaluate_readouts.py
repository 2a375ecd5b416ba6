"""`evaluate --readouts`: several read-outs of one Ext in one pass, to the bit those of passes of their own."""

import dataclasses
import json

import pytest
import torch

from doublehead.analysis.tables import measurements
from doublehead.cli import tables
from doublehead.cli.evaluate import main
from doublehead.config import LossConfig, to_dict
from doublehead.engine.checkpoint import load_model, save_model
from doublehead.engine.evaluator import inference, watch_rois
from doublehead.models.heads import Head
from doublehead.models.rpn import RPN
from doublehead.recipes import RECIPES
from tests.support.analysis_detector import real_models_few_windows, save_detector
from tests.support.engine_standin import finish, free_port, launch, one_thread  # noqa: F401 (a fixture)

READOUTS = ("fused", "split", "fc", "conv")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of an Ext whose fc-head passes some of the RoIs, so that the split read-out selects."""
    folder = save_detector(tmp_path_factory.mktemp("runs") / "ext")
    model, recipe, *more = load_model(folder)
    detection = dataclasses.replace(recipe.model.detection, score_threshold=0.25)
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, detection=detection))
    save_model(folder / "model.safetensors", model, recipe, *more)
    return folder


def evaluate(run, tmp_path, *arguments) -> dict:
    path = tmp_path / "metrics.json"
    main([str(run), "--overwrite", "--metrics", str(path), "--device", "cpu", "--data.val-images", "6", *arguments])
    return json.loads(path.read_text())


def mistake(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments), "--device", "cpu"])
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and len(shown.splitlines()) == 1
    return shown


@pytest.fixture(scope="module")
def apart(run, tmp_path_factory):
    """Read-out -> metrics of a pass of its own."""
    folder = tmp_path_factory.mktemp("apart")
    return {readout: evaluate(run, folder, "--readout", readout) for readout in READOUTS}


def test_one_pass_gives_what_four_give(run, apart, tmp_path, capsys):
    together = evaluate(run, tmp_path, "--readouts", *READOUTS)
    assert list(together["readouts"]) == list(READOUTS)
    assert measurements(together) == [apart[name] for name in READOUTS]  # to the bit, with the RoIs of the box head
    shown = capsys.readouterr().out.splitlines()
    table = [line.split() for line in shown[1 : 2 + len(READOUTS)]]
    assert table[0][:3] == ["read-out", "AP", "AP50"] and [row[0] for row in table[1:]] == list(READOUTS)
    assert [row[1] for row in table[1:]] == [f"{100 * apart[name]['AP']:.1f}" for name in READOUTS]
    heads = next(line.split() for line in shown if line.startswith("AP of class"))
    assert heads[3:] == list(READOUTS)
    share = {name: metrics["box_rois"]["share"] for name, metrics in apart.items()}
    assert share["fused"] == share["fc"] == share["conv"] == 1 and 0 < share["split"] < 1


IMAGE = torch.randint(256, (3, 96, 128), generator=torch.manual_seed(0), dtype=torch.uint8)


def threshold_for(model, count: int) -> float:
    """A score that `count` RoIs of `IMAGE` exceed in the fc-head."""
    seen = []
    hook = model.detector.heads["fc"].register_forward_hook(lambda _, __, output: seen.append(output.logits))
    model.set_readout("fc")
    with inference(model):
        model([IMAGE])
    hook.remove()
    best = seen[0].softmax(1)[:, 1:].amax(1).sort(descending=True).values
    return float(best[count - 1] + best[count]) / 2


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("count", [1, 20, 33])  # the conv-head rounds a single RoI, also a last one, in its own way
def test_detections_are_equal_to_the_bit(run, count, skip):
    model = load_model(run).model
    detection = {"score_threshold": threshold_for(model, count), "skip": skip}
    config = dataclasses.replace(model.config.detection, **detection)
    model.detector.config = dataclasses.replace(model.config, detection=config)
    readouts = [model.detector.resolve_readout(name) for name in READOUTS]
    with inference(model), watch_rois(model) as rois:
        each = model.detect_each([IMAGE], readouts)
        for name, (found,) in zip(READOUTS, each, strict=True):
            model.set_readout(name)
            (alone,) = model([IMAGE])
            alone |= {key: value[0] for key, value in rois.items()}
            assert set(found) == set(alone) and all(found[key].equal(alone[key]) for key in alone), name
            if name == "split":
                assert int(found["box_rois"]) == (count if skip else 40) and len(found["boxes"])


def test_backbone_and_heads_run_once(run, tmp_path, monkeypatch):
    """But for the conv-head on the RoIs that `split` selects, which is what makes its bits those of its own pass."""
    counts, forward, propose = {"rpn": 0, "heads": []}, Head.forward, RPN.forward

    def head(self, x, count=None):
        counts["heads"].append((type(self.tower).__name__, count is not None))
        return forward(self, x, count)

    def rpn(self, *arguments):
        counts["rpn"] += 1
        return propose(self, *arguments)

    monkeypatch.setattr(Head, "forward", head)
    monkeypatch.setattr(RPN, "forward", rpn)
    evaluate(run, tmp_path, "--readouts", "all", "--data.val-images", "2")
    assert counts["rpn"] == 2
    assert counts["heads"] == 2 * [("FCTower", False), ("ConvTower", False), ("ConvTower", True)]


def test_all_fusions_in_one_pass(run, tmp_path, capsys):
    fusions = ("none", "max", "average", "complementary")
    together = evaluate(run, tmp_path, "--fusions", *fusions)
    assert list(together["readouts"]) == [f"fused-{name}" for name in fusions]
    apart = [evaluate(run, tmp_path, "--fusion", name) for name in fusions]
    assert measurements(together) == apart and len({metrics["detections"] for metrics in apart}) > 1
    gated = ("--ext-gate", "0.3", "--fusions", "max", "average", "--readouts", "conv", "fused")
    together = evaluate(run, tmp_path, *gated)
    apart = [evaluate(run, tmp_path, "--readout", "conv", "--ext-gate", "0.3", "--fusion", "max")]
    apart += [evaluate(run, tmp_path, "--ext-gate", "0.3", "--fusion", name) for name in ("max", "average")]
    ours = measurements(together)
    for metrics in (ours[0], apart[0]):  # conv joins nothing
        metrics["detection"].pop("fusion")
    assert ours == apart and ours[1]["box_rois"]["share"] < 1


def test_read_outs_of_one_pass_count_in_the_tables(tmp_path, capsys):
    ext = RECIPES["double-head-ext-r50-fpn"]
    (tmp_path / "ext").mkdir()
    (tmp_path / "ext" / "recipe.json").write_text(json.dumps(to_dict(ext)))
    detection = dataclasses.asdict(ext.model.detection)
    each = {
        f"fused-{fusion}": {
            "detection": {"readout": "fused", "fusion": fusion, "ext_gate": detection["ext_gate"]},
            **{column: ap for column in ("AP", "AP50", "AP75")},
        }
        for fusion, ap in (("none", 0.31), ("max", 0.32), ("average", 0.33), ("complementary", 0.34))
    }
    content = {"data": to_dict(ext.data), "readouts": each}
    (tmp_path / "ext" / "metrics-fusions.json").write_text(json.dumps(content))
    tables.main(["3", "--runs", str(tmp_path), "--format", "csv"])
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [float(row.split(",")[5]) for row in rows[:4]] == pytest.approx([31, 32, 33, 34])


def test_two_processes_give_what_one_gives(run, tmp_path):
    answers = []
    for size in (1, 2):
        out, port = tmp_path / f"m{size}.json", free_port()
        arguments = [run, "--readouts", "all", "--metrics", out, "--device", "cpu", "--data.val-images", "3"]
        logs = [tmp_path / f"log{size}{rank}" for rank in range(size)]
        before = real_models_few_windows
        processes = [launch("evaluate", arguments, log, rank, size, port, before) for rank, log in enumerate(logs)]
        assert [finish(process) for process in processes] == [0] * size, logs[0].read_text()
        answers.append((out.read_bytes(), logs[0].read_text()))
        assert all(not log.read_text() for log in logs[1:])
    assert answers[0] == answers[1] and "read-out" in answers[0][1]


def test_all_is_what_the_loss_weights_train(tmp_path, capsys):
    run = save_detector(tmp_path / "fc-classifies", loss=LossConfig(l_fc=1.0))
    together = evaluate(run, tmp_path, "--readouts", "all")
    assert list(together["readouts"]) == ["fused", "split", "conv"]
    assert "left out, as the loss weights do not train them: fc" in capsys.readouterr().out
    assert "needs the fc-head's box regressor" in mistake(capsys, run, "--readouts", "split", "fc")


def test_mistakes_are_one_line(run, tmp_path, capsys):
    plain = save_detector(tmp_path / "plain", "double_head")
    assert "its head is 'double_head', which has one read-out" in mistake(capsys, plain, "--readouts", "all")
    assert "its head is 'double_head', which has one read-out" in mistake(capsys, plain, "--fusions", "max")
    cases = {
        ("--readouts", "fc", "--readout", "conv"): "--readout and --readouts exclude each other",
        ("--fusions", "max", "--readout", "fc"): "--readout and --fusions exclude each other",
        ("--out", "one.json", "--metrics", "./one.json"): "--out and --metrics are both one.json",
        ("--fusions", "max", "--fusion", "max"): "--fusion and --fusions exclude each other",
        ("--fusions", "max", "--readouts", "fc"): "--fusions are for the fused read-out, --readouts fc has none",
        ("--readouts", "all", "--out", tmp_path / "r.json"): "--out holds the detections of one read-out",
        ("--readouts", "all", "--ext-gate", "2"): "detection.ext_gate: expected 0 (off) or a score below 1, got 2.0",
    }
    for arguments, message in cases.items():
        assert message in mistake(capsys, run, *arguments)
    assert not (tmp_path / "r.json").exists()


def test_a_model_is_left_in_its_own_read_out(run):
    model = load_model(run).model
    before = model.detector.readout
    model.detector.resolve_readout("conv")
    assert model.detector.readout is before
