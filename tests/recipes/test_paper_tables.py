"""The paper's tables: every row has its recipe, runs are found and compared, and every recipe runs."""

import csv
import dataclasses
import io
import json
import statistics

import pytest

from doublehead.analysis.tables import collect
from doublehead.cli import evaluate, tables
from doublehead.config import Recipe, to_dict
from doublehead.data.shapes import CLASSES
from doublehead.engine.checkpoint import save_model
from doublehead.engine.smoke import smoke, smoke_recipe
from doublehead.models import build_detector
from doublehead.paper import TABLES, rows_of
from doublehead.recipes import RECIPES
from doublehead.recipes.miniature import MINIATURES
from doublehead.recipes.paper import paper_recipes

ROWS = [(number, row) for number, table in TABLES.items() for row in table.rows]
PAPERS = list(dict.fromkeys(row.recipe for _, row in ROWS))


def test_rows_are_the_papers():
    assert [len(table.rows) for table in TABLES.values()] == [10, 11, 4, 8, 1, 2]
    for _, table in TABLES.items():
        assert all(len(row.published) == len(table.columns) for row in table.rows)
    best = {row.label: row.published[0] for row in TABLES[4].rows}
    assert best["Double-Head-Ext, R50"] == 40.3 and best["Faster R-CNN, R50-C4"] == 34.8


@pytest.mark.parametrize("name", PAPERS)
def test_recipes_name_their_rows(name):
    about = RECIPES[name].about
    assert "follows the release" in about
    for number, row in rows_of(name):
        assert f"Table {number}: {row.label}" in about


def test_recipes_are_what_their_rows_say():
    model = {name: RECIPES[name].model for name in PAPERS}
    heads = {name: config.head for name, config in model.items()}
    for blocks in (1, 2, 3, 4, 5, 6, 7):
        head = heads[f"double-head-k{blocks}-r50-fpn"]
        assert (head.kind, head.conv_blocks, head.non_local.enabled) == ("double_head", blocks, False)
    for blocks, name in ((3, "double-head-nl3-r50-fpn"), (5, "double-head-r50-fpn"), (7, "double-head-nl7-r50-fpn")):
        assert (heads[name].conv_blocks, heads[name].non_local.enabled) == (blocks, True)
    weights = {name: (config.loss.w_fc, config.loss.w_conv) for name, config in model.items()}
    for name, pair in weights.items():
        single = heads[name].kind in ("fc", "conv", "conv5")
        assert pair == ((1.0, 1.0) if single or "unweighted" in name else (2.0, 2.5)), name
    for row in TABLES[3].rows:
        config = model[row.recipe]
        assert (config.detection.fusion, config.loss.l_fc, config.loss.l_conv) == (row.fusion, 0.7, 0.8)
    for name, recipe in RECIPES.items():
        if name in PAPERS:
            assert recipe.model.backbone.name == ("resnet101" if "r101" in name else "resnet50")
            assert recipe.model.rpn.post_nms_train == (2000 if "c4" in name else 1000)  # of each image


def distinct_models() -> list[str]:
    """One recipe of each backbone and head: rows that differ in depth, loss weights, read-out or data run alike."""
    heads = {one.name: dataclasses.replace(one.model.head, conv_blocks=5) for one in paper_recipes()}
    models = {(str(one.model.backbone), str(heads[one.name])): one.name for one in paper_recipes()}
    return list(models.values())


@pytest.mark.parametrize("name", distinct_models())
def test_every_model_runs(name):
    result = smoke(RECIPES[name])
    assert len(result.losses) == 2 and result.detections > 0
    kept = smoke_recipe(RECIPES[name]).model
    assert (kept.head, kept.loss, kept.backbone.name) == (
        RECIPES[name].model.head, RECIPES[name].model.loss, RECIPES[name].model.backbone.name,
    )  # fmt: skip


def test_smoke_notices_what_does_not_learn(monkeypatch):
    recipe = RECIPES["shapes-ext"]
    silent = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, lr=0.0, weight_decay=0.0))
    with pytest.raises(RuntimeError, match="shapes-ext: training changed nothing in fc.tower"):
        smoke(silent)


# ---------------------------------------------------------------------- runs


def write_run(folder, recipe: Recipe, metrics: dict, name: str = "metrics.json"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.json").write_text(json.dumps(to_dict(recipe)))
    (folder / name).write_text(json.dumps(metrics))


def with_train(recipe: Recipe, **changes) -> Recipe:
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, **changes))


def numbers(ap: float) -> dict:
    return {"AP": ap, "AP50": ap + 0.2, "AP75": ap + 0.05, "APs": None, "APm": ap, "APl": ap}


def rows_printed(arguments, capsys) -> tuple[dict[str, dict[str, str]], str]:
    tables.main([*arguments, "--format", "csv"])
    out, err = capsys.readouterr()
    return {row["row"]: row for row in csv.DictReader(io.StringIO(out))}, err


def test_runs_stand_beside_the_paper(tmp_path, capsys):
    fc = RECIPES["faster-rcnn-r50-fpn"]
    for seed, ap in enumerate((0.36, 0.37, 0.38)):
        elsewhere = dataclasses.replace(fc, data=dataclasses.replace(fc.data, root="/elsewhere", workers=1))
        write_run(tmp_path / "deep" / f"fc-{seed}", with_train(elsewhere, seed=seed), numbers(ap))
    rows, _ = rows_printed(["1", "--runs", str(tmp_path)], capsys)
    row = rows["single fc"]
    assert row["runs"] == "3" and row["AP paper"] == "36.8"
    assert float(row["AP mean"]) == pytest.approx(37) and float(row["AP std"]) == pytest.approx(1)
    assert row["APs mean"] == row["APs std"] == ""  # nothing measured: a blank
    assert rows["single conv"]["runs"] == "0" and rows["single conv"]["AP mean"] == ""
    tables.main(["4", "1", "--runs", str(tmp_path)])
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if line.startswith("FPN baseline, R50"))
    assert line.split()[3:8] == ["faster-rcnn-r50-fpn", "3", "36.8", "37.0", "±1.0"]
    tables.main(["1", "--runs", str(tmp_path), "--format", "markdown"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("| single fc | faster-rcnn-r50-fpn | 3 | 36.8 | 37.0 ±1.0 |") for line in lines)
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_one_training_serves_all_fusions(tmp_path, capsys):
    ext = RECIPES["double-head-ext-r50-fpn"]
    write_run(tmp_path / "ext", ext, numbers(0.403))
    for fusion, ap in (("max", 0.399), ("average", 0.401)):
        measured = {"detection": {"readout": "fused", "fusion": fusion, "ext_gate": 0.0}} | numbers(ap)
        write_run(tmp_path / "ext", ext, measured, f"metrics-{fusion}.json")
    gated = {"detection": {"readout": "fused", "fusion": "none", "ext_gate": 0.1}} | numbers(0.1)
    write_run(tmp_path / "ext", ext, gated, "metrics-gate.json")  # approximate: no row of the table
    rows, _ = rows_printed(["3", "--runs", str(tmp_path)], capsys)
    found = {label: row["AP mean"] and round(float(row["AP mean"]), 1) for label, row in rows.items()}
    assert found == {"none (fc-head's)": "", "max": 39.9, "average": 40.1, "complementary": 40.3}


def test_evaluate_writes_what_tables_reads(tmp_path, capsys):
    recipe = RECIPES["miniature-double-head-ext"]
    data = dataclasses.replace(recipe.data, val_images=2, workers=0)
    backbone = dataclasses.replace(recipe.model.backbone, weights=None)
    small = dataclasses.replace(recipe, data=data, model=dataclasses.replace(recipe.model, backbone=backbone))
    folder = tmp_path / "ext"
    write_run(folder, small, numbers(0.5))
    save_model(folder / "model.safetensors", build_detector(small.model, 7), small, CLASSES, range(1, 7), 0)
    evaluate.main([str(folder), "--fusion", "max", "--metrics", str(folder / "metrics-max.json"), "--device", "cpu"])
    written = json.loads((folder / "metrics-max.json").read_text())
    assert written["detection"] == {"readout": "fused", "fusion": "max", "ext_gate": 0.0}
    assert written["data"] == to_dict(data) and 0 <= written["AP"] <= 1
    of_max = {item.recipe.model.detection.fusion: item.metrics["AP"] for item in collect(tmp_path).evaluations}
    assert of_max == {"complementary": 0.5, "max": written["AP"]}
    with pytest.raises(SystemExit):
        evaluate.main([str(folder), "--metrics", "/nowhere/metrics.json"])
    assert "--metrics /nowhere/metrics.json: cannot be written" in capsys.readouterr().err


def test_test_dev_counts_for_table_5_alone(tmp_path, capsys):
    recipe = RECIPES["double-head-ext-r101-fpn"]
    write_run(tmp_path / "ext", recipe, numbers(0.419))
    rows, _ = rows_printed(["5", "--runs", str(tmp_path)], capsys)
    assert rows["Double-Head-Ext, R101"]["AP mean"] == ""
    server = {"data": {"val_split": "test-dev2017"}} | numbers(0.423)
    write_run(tmp_path / "ext", recipe, server, "metrics-test-dev.json")
    rows, _ = rows_printed(["5", "--runs", str(tmp_path)], capsys)
    assert float(rows["Double-Head-Ext, R101"]["AP mean"]) == pytest.approx(42.3)
    rows, _ = rows_printed(["4", "--runs", str(tmp_path)], capsys)
    assert float(rows["Double-Head-Ext, R101"]["AP mean"]) == pytest.approx(41.9)


def test_changed_and_unfinished_runs_are_named_and_left_out(tmp_path, capsys):
    fc = RECIPES["faster-rcnn-r50-fpn"]
    write_run(tmp_path / "short", with_train(fc, steps=10), numbers(0.01))
    write_run(tmp_path / "stopped", fc, {}, "other.json")
    write_run(tmp_path / "broken", fc, numbers(0.9))
    (tmp_path / "broken" / "metrics.json").write_text("{")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "recipe.json").write_text('{"soup": 1}')
    rows, notes = rows_printed(["1", "--runs", str(tmp_path)], capsys)
    assert rows["single fc"]["runs"] == "0"
    for note in (
        "short: faster-rcnn-r50-fpn with train.steps 10 instead of 180000",
        "stopped: not finished",
        "broken",
        "foreign",
    ):
        assert note in notes


def test_miniature_rows(tmp_path, capsys):
    shown = {row.miniature for table in TABLES.values() for row in table.rows} - {None}
    assert shown == set(MINIATURES.values())
    values = (0.5, 0.6)
    for seed, ap in enumerate(values):
        write_run(tmp_path / f"conv-{seed}", with_train(RECIPES["miniature-conv"], seed=seed), numbers(ap))
    rows, _ = rows_printed(["1", "--miniature", "--runs", str(tmp_path)], capsys)
    assert rows["single conv"]["recipe"] == "miniature-conv"
    assert float(rows["single conv"]["AP std"]) == pytest.approx(100 * statistics.stdev(values))
    assert "double-fc" not in rows and "double-fc, weighted" in rows
    tables.main(["--miniature"])
    text = capsys.readouterr().out
    assert text.count("In miniature: ") == 3 and "Table 2" not in text and "Compare the order of the rows" in text


def test_writing_to_a_file(tmp_path, capsys):
    tables.main(["6", "--out", str(tmp_path / "six.txt")])
    assert (tmp_path / "six.txt").read_text().startswith("Table 6. Pascal VOC 2007")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["7"], "there is no Table 7"),
        (["1", "2", "--miniature"], "Table 2 has no row in miniature: 1, 3, 4 have"),
        (["1", "--runs", "/nowhere/runs"], "--runs /nowhere/runs: no such folder"),
        (["1", "--out", "/nowhere/one.txt"], "--out /nowhere/one.txt: cannot be written"),
        (["1", "--smoke", "--format", "csv"], "--smoke goes alone"),
    ],
)
def test_wrong_input(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        tables.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_recipe_that_fails_is_reported(monkeypatch, capsys):
    def fails(recipe):
        raise RuntimeError("no")

    monkeypatch.setattr("doublehead.engine.smoke.smoke", fails)
    with pytest.raises(SystemExit) as stop:
        tables.main(["5", "--smoke"])
    out = capsys.readouterr().out
    assert stop.value.code == 1 and "double-head-ext-r101-fpn: FAILED: RuntimeError: no" in out
