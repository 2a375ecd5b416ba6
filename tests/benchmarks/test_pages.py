"""The tables in README.md, docs/benchmarks.md and benchmarks/RESULTS.md say what benchmarks/results/ holds."""

import json
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

SCRIPT = ROOT / "benchmarks" / "plot.py"


@pytest.fixture
def plot(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import plot

    return plot


def test_tables_are_up_to_date():
    result = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_headline_has_been_recorded(plot):
    recorded = {case["case"] for case in plot.load(plot.RESULTS / "cpu")}
    assert set(plot.HEADLINES) | set(plot.SUMMARY_CPU) <= recorded
    assert plot.recorded(plot.load(plot.RESULTS / "cpu")) is not None


def test_every_row_of_the_summary_has_been_measured_on_a_gpu(plot):
    (record,) = [json.loads(path.read_text()) for path in plot.RESULTS.glob("headline-*.json")]
    measured = {row["row"] for row in record["rows"] if row["status"] == "measured"}
    assert set(plot.SUMMARY_GPU) <= measured
    page = (ROOT / "README.md").read_text()
    assert all(f"| GPU | {words} |" in page for words, _ in plot.SUMMARY_GPU.values())


def test_a_changed_result_changes_the_table(plot, tmp_path, monkeypatch):
    shown = plot.HEADLINES.keys() & plot.SUMMARY_CPU
    case = next(case for case in plot.load(plot.RESULTS / "cpu") if case["case"] in shown)
    case["providers"]["doublehead"]["median_ms"] = 123456.0
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "nms.json").write_text(json.dumps({"op": "nms", "cases": [case]}))
    before = plot.pages()
    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    after = plot.pages()
    assert all("123,456" in after[path] and "123,456" not in before[path] for path in after)


def test_the_ratio_is_that_of_the_medians(plot):
    for case in plot.load(plot.RESULTS / "cpu"):
        for name, ratio in case["speedup"].items():
            times = [case["providers"][provider]["median_ms"] for provider in (name, "doublehead")]
            assert ratio == pytest.approx(times[0] / times[1], rel=0.01)


def test_a_gpu_s_table_shows_what_the_kernels_did(plot):
    case = next(case for case in plot.load(plot.RESULTS / "cpu") if case["case"] in plot.HEADLINES)
    case["providers"]["doublehead"] |= {"kernel_ms": 0.0625, "share_of_copy_bandwidth": 0.71}
    case["kernel_speedup"] = {"torchvision": 4.5}
    header, _, line = plot.table([("one", case)])
    assert header.count("|") == line.count("|") == 10
    assert line.endswith("| 0.0625 | **4.5x** | 71% |")
