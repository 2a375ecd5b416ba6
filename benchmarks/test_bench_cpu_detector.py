"""Whole detectors on a CPU, in one run: ours and what a user would pick instead, in every precision, on one picture.

pytest benchmarks/test_bench_cpu_detector.py --benchmark-only             what the targets need
pytest benchmarks/test_bench_cpu_detector.py --benchmark-only --full      all rows of cpu_rows.py, torch.compile too

First the gate.  In float64 torchvision's model, the accelerated one and its conversion find the same.  Then every row
has to find, at full size, what its detector's plain modules find in fp32: the share that `AGREE` wants.  Where the
conv-head is to see a quarter of the RoIs, that share is checked in the row's own precision.  What cannot run here is a
row that is missing, with the reason.
"""

from __future__ import annotations

from itertools import combinations

import cpu_rows
import harness
import pytest
from cpu_rows import CASE, COMPILED, EXPORTED, EXT, OURS, QUARTER, ROWS, Row
from inputs import DEVICE
from torch import Tensor

pytest.importorskip("torchvision")

from cpu_detectors import Detectors, precision, share_passing  # noqa: E402
from detector_checks import same_in_float64, shared  # noqa: E402
from detectors import pictures  # noqa: E402
from stages import shares  # noqa: E402

AGREE = {
    cpu_rows.FP32: 0.9,
    cpu_rows.BF16: 0.3,
    cpu_rows.INT8: 0.3,
    cpu_rows.INT8_BF16: 0.3,
    cpu_rows.WHOLE_INT8: 0.3,
}
"""Share of the detections that must have a counterpart in fp32's: of a random network's close scores rounding changes
some, 16 and 8 bits many."""
BY_CHANCE = 0.05
"""Two different detectors share less than that."""

Detections = list[dict[str, Tensor]]


def check(detectors: Detectors, row: Row, found: Detections) -> None:
    expected = detectors.reference(row.family)
    assert sum(len(image["boxes"]) for image in found) > 0, f"{row.name}: no detections, which measures nothing"
    agreed = shared(found, expected)
    assert agreed >= AGREE[row.precision], f"{row.name}: {agreed:.2f} of the detections agree, {AGREE[row.precision]}"


def wanted(full: bool, measures: bool) -> list[Row]:
    """The rows of this run. Where nothing is timed, one detector stands for all that are exported."""
    rows = [row for row in ROWS if full or row.headline]
    if measures or full:
        return rows
    return [row for row in rows if not row.exported or row.detector == EXT]


@pytest.mark.skipif(DEVICE != "cpu", reason="of a CPU")
def test_cpu_detectors(compare):
    side, proposals = (800, 1000) if compare.measures else (128, 60)
    images = pictures(1, side)
    detectors = Detectors(images, side, proposals)
    same_in_float64(detectors.originals)
    models, missing, rows = {}, {}, {}
    for row in wanted(compare.full, compare.measures):
        model = detectors.model(row)
        rows[row.name] = row.described()
        if isinstance(model, str):
            missing[row.name] = model
            continue
        models[row.name] = model
        if row.rois == QUARTER and row.runtime == OURS:
            with precision(row):
                passing = share_passing(model, images)
            rows[row.name]["share"] = passing
            assert 0.2 <= passing <= 0.3, f"{row.name}: {passing:.0%} of the RoIs pass"
    calls = {row.name: detectors.call(row, models[row.name]) for row in ROWS if row.name in models}
    families = {row.family for row in ROWS if row.name in models}
    for one, other in combinations(sorted(families), 2):
        if one[0] != other[0]:
            assert shared(detectors.reference(one), detectors.reference(other)) < BY_CHANCE
    stages_ms = {}
    if compare.measures:
        inside = [row for row in ROWS if row.name in models and not row.exported and row.runtime != COMPILED]
        stages_ms = {row.name: shares(models[row.name], calls[row.name], 1) for row in inside}
    record = compare(
        op="detector",
        case=CASE,
        details={"batch": 1, "side": side, "rows": rows, "stages_ms": stages_ms},
        providers={name: calls.get(name, missing.get(name)) for name in rows},
        check=lambda actual, expected: check(detectors, *actual),
        budget=150.0,
        min_rounds=3,
    )
    if record is not None:
        for name, result in record["providers"].items():
            if "median_ms" in result:
                result["images_per_second"] = round(1e3 / result["median_ms"], 3)
            if rows[name]["runtime"] in EXPORTED and "peak_mib" in result:
                result["peak_mib"] = None  # these keep their memory from call to call
        if compare.records:
            harness.write_record("detector", record, DEVICE)
