"""Tables, charts and records of runs that never were."""

import json
import re

import pytest

from doublehead.analysis.heads.curves import learning_curves
from doublehead.recipes import RECIPES
from tests.support.evidence import ORIGIN, of_heads, of_pearson, of_runs, script

tables, charts, record, views = script("tables"), script("charts"), script("record"), script("views")
VARIANTS = ("model.head.conv_blocks=5", "train.accumulate=8")
ALL = {
    "bccd": of_runs(("fc", "double_fc", "double_head", "double_head_ext")), "heads-shapes": of_heads(),
    "heads-factors": of_heads(VARIANTS), "pearson": of_pearson(), "own-data": of_runs(("own", "from")),
}  # fmt: skip
COMMITTED = script("reading").load()
OF_COMMITTED = {"implementation": "implementation", "norms": "conv_norms", "precision": "precision"}
"""Tables whose records are not made up here."""
OF_RUNS = ("losses", "by-step", "start")
OF_BOTH = ("kinds", "differences")


@pytest.mark.parametrize("name", tables.OF_ONE)
def test_a_table_has_as_many_cells_in_each_row(name):
    if name == "quantized":
        assert "int8               37.56       -0.14" in tables.table(name, "precision", COMMITTED)
        return
    if name in OF_COMMITTED:
        lines = tables.table(name, OF_COMMITTED[name], COMMITTED).splitlines()
        assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
        return
    of = {"own-data": ["own-data"], "depth": ["heads-factors"], "factors": ["heads-factors"]}
    default = ["bccd", "heads-shapes"] if name in OF_BOTH else ["bccd"] if name in OF_RUNS else ["heads-shapes"]
    for one in of.get(name, default):
        rows = [line for line in tables.table(name, one, ALL).splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in rows}) <= 1
        assert name == "origin" or len(rows) > 2


def test_norms_are_shown_by_when_and_head():
    rows = [
        {"when": "end", "head": "conv", "statistics": "running", "seed": seed, "iou": 0.7 + seed / 100, "loss_cls": 0.3}
        for seed in (0, 1, 2)
    ]
    assert "| end | conv | running | 0.710 ± 0.010 | 0.300 ± 0.000 |" in views.norms({"results": rows})


def test_numbers_are_in_percent_with_their_spread():
    assert "| Double-Head | 3 | 39.5 | 42.2 ± 0.2 |" in views.kinds(ALL["bccd"])
    assert "| Double-Head - single fc | AP | +2.2 | 0.12 | +11.0 | +1.7 .. +2.7 | 3 |" in views.differences(ALL["bccd"])


def test_findings_are_judged_by_the_rule():
    text = views.findings(ALL)
    assert "| AP, BCCD | **appears** | +3.0 | +2.2 | 0.12 |" in text
    assert "| Pearson, windows | **appears** |  | +0.050 | 0.0100 |" in text
    assert "no record" in views.findings({})


def test_a_page_without_a_record_says_so():
    empty = "<!-- table kinds bccd -->\n{}<!-- end -->\n<!-- table losses bccd -->\n<!-- end -->\nmore"
    note = "*Not measured yet: `evidence/run.sh bccd` does it.*\n"
    assert tables.rewritten(empty.format("old\n"), {}) == empty.format(note)  # said once of each record
    filled = tables.rewritten(empty.format(""), ALL)
    assert "42.2 ± 0.2" in filled and note not in filled and tables.rewritten(filled, ALL) == filled
    with pytest.raises(KeyError):
        tables.rewritten(empty.format("").replace("kinds", "kind"), {})


@pytest.mark.parametrize("name", ["bccd-loss", "heads-curves", "factors"])
def test_a_chart_is_drawn_again_when_its_record_changes(name, tmp_path):
    assert name in charts.outdated(tmp_path, ALL)
    charts.draw(tmp_path, name, ALL)
    assert name not in charts.outdated(tmp_path, ALL)
    of = charts.CHARTS[name].record
    changed = ALL[of] | {"seconds": 61.0}
    assert name in charts.outdated(tmp_path, ALL | {of: changed})


def run_folder(folder, kind, seed, **changes):
    """A training's folder, as far as a record reads it."""
    path = folder / f"{kind}-{seed}"
    path.mkdir(parents=True)
    recipe = {"train": {"seed": seed, "steps": 40, "milestones": [9, 15]} | changes, "model": {"head": {"kind": kind}}}
    metrics = dict.fromkeys(record.NUMBERS, 0.5) | {"seconds": 10.0, "step": 40, "best": {"step": 40, "AP": 0.5}}
    log = [{"step": 20, "loss": 1.23456}, {"step": 20, "AP": 0.4}]
    (path / "recipe.json").write_text(json.dumps(recipe))
    (path / "metrics.json").write_text(json.dumps(metrics))
    (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))


def test_a_record_of_trainings(tmp_path, monkeypatch):
    for kind, seed in (("fc", 0), ("double_head", 0), ("double_head", 1), ("double_head_ext", 0)):
        run_folder(tmp_path, kind, seed)
    (tmp_path / "double_head-1" / "metrics.json").unlink()  # still running
    found = record.bccd(tmp_path, None)
    assert [(run["kind"], run["seed"]) for run in found["runs"]] == [
        ("fc", 0), ("double_head", 0), ("double_head_ext", 0)
    ]  # fmt: skip
    assert found["seconds"] == 30.0 and found["seeds"] == [0]
    assert "--train.steps 40 --train.milestones 9 15 " in found["command"]
    assert found["runs"][0]["loss"] == [[20, 1.2346]] and found["runs"][0]["AP_by_step"] == {"20": 0.4}
    record.write(tmp_path / "records" / "bccd.json", found)
    assert json.loads((tmp_path / "records" / "bccd.json").read_text()) == found


def test_trainings_that_differ_in_more_than_their_heads_are_refused(tmp_path):
    run_folder(tmp_path, "fc", 0)
    run_folder(tmp_path, "double_head", 0, steps=80)
    with pytest.raises(SystemExit, match="double_head-0: its recipe is not that of"):
        record.bccd(tmp_path, None)


def test_a_figures_seeds_are_those_of_its_models(tmp_path):
    heads = [{"checkpoint": f"models/fc-seed{seed}", "name": "fc"} for seed in (0, 2)]
    path = tmp_path / "pearson.json"
    path.write_text(json.dumps(ORIGIN | {"figure": "pearson", "heads": heads, "value": 0.123456789}))
    assert record.figure(path)["seeds"] == [0, 2] and record.figure(path)["value"] == 0.12346
    path.write_text(json.dumps({"figure": "balance-weights", "heads": {"record": str(tmp_path / "heads.json")}}))
    (tmp_path / "heads.json").write_text(json.dumps({"seeds": [1]}))
    assert record.figure(path)["seeds"] == [1]


def heads_file(path, seeds, **changes):
    """A `heads.json`, as far as a record reads it."""
    rows = {name: [{"seed": seed, "seconds": 2.0} for seed in seeds] for name in ("trainings", "results", "heads")}
    content = {"seeds": seeds, "digest": "a", "variants": {}, "features": {"seconds": 1.5}} | rows | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    return path


def test_a_record_of_heads_counts_their_features(tmp_path):
    assert record.heads("shapes", [heads_file(tmp_path / "heads.json", [0, 1], digest=None)])["seconds"] == 5.5


def test_seeds_of_several_files_join(tmp_path):
    later, earlier = heads_file(tmp_path / "later.json", [0, 2], commit="later"), tmp_path / "earlier.json"
    record.write(earlier, record.heads("shapes", [heads_file(earlier, [1], commit="earlier")]))  # a record joins too
    found = record.heads("shapes", [earlier, later])
    assert found["seeds"] == [0, 1, 2] and found["commit"] == "later" and found["seconds"] == 7.5
    for name in ("trainings", "results", "heads"):
        assert sorted(row["seed"] for row in found[name]) == [0, 1, 2]


@pytest.mark.parametrize(
    ("seeds", "changes", "words"),
    [
        ([1], {}, r"seeds \[1, 1, 2\]: one is in two files"),
        ([0], {"digest": "b"}, "a.json: its trainings differ from those of .*b.json in more than seeds"),
        ([0], {"digest": None}, "a.json: its trainings differ"),
        ([0], {"variants": {"x": {}}}, "a.json: its variants are not those"),
    ],
)
def test_trainings_of_other_heads_do_not_join(tmp_path, seeds, changes, words):
    files = [heads_file(tmp_path / "a.json", seeds, **changes), heads_file(tmp_path / "b.json", [1, 2])]
    with pytest.raises(SystemExit, match=words):
        record.heads("shapes", files)


def test_trainings_on_a_cpu_and_on_a_gpu_do_not_join(tmp_path):
    of_gpu = {"trainings": [{"seed": 0, "seconds": 2.0, "machine": {"gpu": "a GPU"}}]}
    files = [heads_file(tmp_path / "a.json", [0], **of_gpu), heads_file(tmp_path / "b.json", [1])]
    with pytest.raises(SystemExit, match="trained on a CPU and on a GPU: they do not join"):
        record.heads("shapes", files)


@pytest.mark.parametrize("ours", ["double_head", "fc"])
def test_a_title_speaks_of_a_crossing_where_one_is_drawn(ours):
    """The made-up double head is ahead everywhere; with one step in which it is behind, the curves cross."""
    heads = of_heads()
    first = min(row["step"] for row in heads["results"])
    behind = [row | {"AP": 0.0} if (row["kind"], row["step"]) == (ours, first) else row for row in heads["results"]]
    panel = learning_curves(heads | {"results": behind}).axes[0]
    dotted = [line for line in panel.lines if line.get_linestyle() == ":"]
    assert len(dotted) == (ours == "double_head")
    assert panel.get_title() == ("AP; dotted: Double-Head crosses single fc" if dotted else "AP")


def test_the_wall_time_of_a_part_is_that_of_all_its_calls(tmp_path):
    path = tmp_path / "seconds.tsv"
    path.write_text("bccd\t10\nheads\t7\nbccd\t5\n")
    assert record.wall_seconds(path, "bccd") == 15
    with pytest.raises(SystemExit, match="figures has not ended"):
        record.wall_seconds(path, "figures")
    assert "| 1.0 | 0.2 | 3 | a processor, one thread |" in views.costs({"bccd": ALL["bccd"] | {"wall_seconds": 12}})


def test_a_record_made_on_a_gpu_names_it():
    one = ALL["bccd"] | {"machine": ALL["bccd"]["machine"] | {"gpu": "a GPU"}}
    assert "; a GPU, torch 2.14; " in views.origin(one) and "| a GPU |" in views.costs({"bccd": one})


def test_throughput_counts_heads_and_rois():
    text = views.throughput({name: COMMITTED[name] for name in ("heads-factors", "heads-shapes", "bccd")})
    assert "| `heads-factors.json` | NVIDIA H200 | 34 | 1,006 | 34,211 |" in text
    assert "| `heads-shapes.json` | AMD EPYC, one thread | 8 | 275 | 2,203 |" in text and text.count("\n") == 3


def test_every_factor_that_was_measured_has_words():
    assert COMMITTED["heads-factors"]["variants"].keys() == script("factors").WORDS.keys()


def test_the_words_of_a_factor_have_its_number_and_the_base_s():
    base = {**vars(RECIPES["miniature-double-head-ext"].model.head), "samples": 64}  # RoIs as in run.sh
    counts = {"conv_blocks", "conv_dim", "fc_dim", "samples"}
    for variant, changes in COMMITTED["heads-factors"]["variants"].items():
        for field, value in ((path.split(".")[-1], value) for path, value in changes.items()):
            if field in counts:
                assert re.findall(r"\d+", script("factors").words(variant)) == [str(value), str(base[field])]


def test_a_commit_that_is_given_is_that_of_all_trainings(tmp_path, monkeypatch):
    file = heads_file(tmp_path / "a.json", [0, 1], commit=None)
    monkeypatch.setattr(
        "sys.argv", ["record.py", "heads", "some", str(file), "--commit", "abc", "--out", str(tmp_path)]
    )
    record.main()
    found = json.loads((tmp_path / "heads-some.json").read_text())
    assert {found["commit"], *(one["commit"] for one in found["trainings"])} == {"abc"}
