"""The rows of detectors on a CPU: what is missing is named, with the reason, in the record and in every table."""

from __future__ import annotations

import sys
import time

import pytest
import torch

from tests.support.paths import BENCHMARKS

pytest.importorskip("torchvision")
sys.path.insert(0, str(BENCHMARKS))

import cpu_detectors  # noqa: E402
import cpu_rows  # noqa: E402
import cpu_tables  # noqa: E402
import detector_checks  # noqa: E402
import harness  # noqa: E402
import smoke_detector  # noqa: E402
import stages  # noqa: E402

REASON = "this processor has neither AVX512-BF16 nor AMX: bf16 would be emulated"


def record(**milliseconds: float | str) -> dict:
    """A record of all rows: each takes a second, but for those named (spaces as underscores), or is missing."""
    providers = {}
    for row in cpu_rows.ROWS:
        value = milliseconds.get(row.name.replace(" ", "_").replace("-", "_"), 1000.0)
        result = {"median_ms": value, "p99_ms": value, "images_per_second": 1.0, "peak_mib": 1.0}
        providers[row.name] = {"missing": value} if isinstance(value, str) else result
    environment = {"processor": "one", "threads": 2, "torch": "2", "torchvision": "0", "python": "3", "date": "now"}
    rows = {row.name: row.described() for row in cpu_rows.ROWS}
    return {
        "op": "detector",
        "case": cpu_rows.CASE,
        "details": {"batch": 1, "side": 800, "rows": rows, "stages_ms": {}},
        "providers": providers,
        "environment": environment | {"commit": "c", "instructions": ["AVX2", "AVX-512"]},
    }


def test_every_target_is_of_two_rows():
    names = [row.name for row in cpu_rows.ROWS]
    assert len(set(names)) == len(names)
    for target in cpu_rows.TARGETS:
        assert {target.ours, target.peer} <= set(names) and target.ours != target.peer


def test_a_run_without_full_has_the_rows_of_the_targets():
    headline = {row.name for row in cpu_rows.ROWS if row.headline}
    wanted = {name for target in cpu_rows.TARGETS for name in (target.ours, target.peer)}
    # OpenVINO's own quantisation takes minutes, and nobody asks of what is compared with it alone.
    assert {name for name in wanted - headline if "int8" not in name} == set()


def test_a_target_is_met_missed_or_not_measured():
    page = cpu_tables.targets_table([record(doublehead=600.0, **{"doublehead,_bf16": 800.0})])
    assert "accelerated, fp32 | torchvision's Faster R-CNN, fp32 | 1.5x | **1.67x** | met |" in page
    assert "accelerated, bf16 | torchvision's Faster R-CNN, bf16 | 1.4x | **1.25x** | missed |" in page
    page = cpu_tables.targets_table([record(**{"torchvision,_bf16": REASON})])
    assert f"accelerated, bf16 | torchvision's Faster R-CNN, bf16 | 1.4x |  | not measured: {REASON} |" in page
    assert cpu_tables.targets_table([]) == cpu_tables.NOTHING


def test_missing_rows_are_named_with_the_reason():
    case = record(**{"torchvision,_bf16": REASON, "Double_Head_Ext,_bf16": REASON})
    page = cpu_tables.rows_table(case)
    assert f"Not measured, as {REASON}: torchvision's Faster R-CNN, bf16; Double-Head-Ext, bf16." in page
    assert page.count("| Double-Head-Ext | doublehead | bf16 | every RoI |") == 0
    assert "one (AVX2, AVX-512), 2 threads" in page
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == len(cpu_rows.ROWS)  # two less, and the head
    shown, missing = cpu_tables.summary_rows(
        case, [("doublehead", "torchvision"), ("Double-Head-Ext, bf16", "torchvision")]
    )
    assert len(shown) == 1 and REASON in missing[0]


@pytest.mark.parametrize("flags, reason", [("fpu avx2", REASON), ("fpu avx2 avx512f avx512_bf16", None), ("", REASON)])
def test_bf16_is_timed_where_the_processor_has_it(monkeypatch, flags, reason):
    monkeypatch.setattr(harness, "_cpu_info", lambda: f"model name\t: one\nflags\t\t: {flags}\n")
    assert harness.lacks_bf16() == reason
    assert ("AVX512-BF16" in harness.environment()["instructions"]) == (reason is None)


def test_a_quarter_of_the_rois_passes():
    model = smoke_detector.tiny_ext().eval()
    images = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))]
    for share in (0.25, 0.75):
        cpu_detectors.let_pass(model, images, share)
        passing = (cpu_detectors.scores(model, images) > model.detector.readout.least_score).float().mean()
        assert abs(passing - share) < 0.1


def test_a_wrong_layer_is_seen_before_anything_is_chosen():
    model = smoke_detector.tiny_ext().eval()
    with torch.inference_mode():
        right = detector_checks.inside(detector_checks.plain(model))
        assert detector_checks.off_by_most(detector_checks.inside(model), right) < 1e-3
    with torch.no_grad():
        weight = model.detector.heads["conv"].tower[0].shortcut[0].weight
        weight.copy_(weight.roll(1, 0))
    with torch.inference_mode():
        assert detector_checks.off_by_most(detector_checks.inside(model), right) > 0.3


def test_the_stages_time_the_whole_and_replace_no_module_s_forward():
    model, replaced = smoke_detector.tiny_ext().eval(), []
    for module in (model.transform, model.detector.backbone, model.detector.rpn):
        module.register_forward_hook(lambda module, *_: replaced.append("forward" in vars(module)))
    with torch.inference_mode():
        spent = stages.shares(model, lambda: model([torch.rand(3, 64, 64)]), 1)
    assert set(spent) == {"transform", "backbone", "rpn", "roi, heads", "post-processing"}
    assert all(value > 0 for value in spent.values())
    assert replaced == [False] * 3
    assert "watch" not in type(model.detector.backbone).forward.__qualname__


def test_what_takes_too_long_is_given_up():
    with pytest.raises(TimeoutError, match="not done in 0.05 s"), cpu_detectors.at_most(0.05):
        time.sleep(5)
