"""Whole detectors on a CPU, in one run: ours and what a user would pick instead, in every precision, on one picture.

pytest benchmarks/test_bench_cpu_detector.py --benchmark-only             what the targets need
pytest benchmarks/test_bench_cpu_detector.py --benchmark-only --full      all rows of cpu_rows.py, torch.compile too

First the gate.  In float64 torchvision's model, the accelerated one and its conversion find the same.  Feature maps and
heads of every row that PyTorch runs are held against the plain modules in fp32 (`OFF`), and every row has to find, at
full size, what these find (`AGREE`).  Where the conv-head is to see a quarter of the RoIs, that share is checked in the
row's own precision.  What cannot run here is a row that is missing, with the reason.
"""

from __future__ import annotations

from itertools import combinations

import cpu_rows
import harness
import pytest
import torch
from cpu_rows import CASE, COMPILED, DOUBLE, EXPORTED, EXT, QUARTER, ROWS, Row
from cpu_tables import targets_lines
from inputs import DEVICE
from torch import Tensor, nn

pytest.importorskip("torchvision")

from cpu_detectors import Detectors, precision, shares_of_rois  # noqa: E402
from detector_checks import inside, off_by_most, plain, same_in_float64, shared  # noqa: E402
from detectors import pictures  # noqa: E402
from stages import shares  # noqa: E402

FP32, BF16, INT8S = cpu_rows.FP32, cpu_rows.BF16, (cpu_rows.INT8, cpu_rows.INT8_BF16, cpu_rows.WHOLE_INT8)
AGREE = {FP32: 0.9, BF16: 0.4} | dict.fromkeys(INT8S, 0.4)
"""Share of the detections that must have a counterpart in fp32's: rounding turns choices between near equals."""
BY_CHANCE = 0.05
"""Two different detectors share less than that."""
OFF = {FP32: 1e-3, BF16: 0.1} | dict.fromkeys(INT8S, 0.2)
"""How far feature maps and the heads' outputs may be from fp32's, relative to how much they vary.  What is wrong is off
by about 1."""

TIMED, CHECKED = (800, 1000), (128, 60)
"""The pictures' side in pixels, and the number of proposals."""

Detections = list[dict[str, Tensor]]


def check(detectors: Detectors, row: Row, found: Detections) -> None:
    expected = detectors.reference(row.family)
    assert sum(len(image["boxes"]) for image in found) > 0, f"{row.name}: no detections, which measures nothing"
    agreed = shared(found, expected)
    assert agreed >= AGREE[row.precision], f"{row.name}: {agreed:.2f} of the detections agree, {AGREE[row.precision]}"


def rows_of_the_run(full: bool, measures: bool) -> list[Row]:
    """The rows of this run. Where nothing is timed, --full alone has the exported ones: translating takes long."""
    return [row for row in ROWS if full or row.headline and (measures or not row.exported)]


def check_inside(detectors: Detectors, row: Row, model: nn.Module) -> None:
    reference = detectors.weights[row.weights]
    with torch.inference_mode():
        expected = inside(plain(reference) if hasattr(reference, "detector") else reference)
        with precision(row):
            found = inside(model)
    off = off_by_most(found, expected)
    assert off < OFF[row.precision], f"{row.name}: off by {off:.3g}, {OFF[row.precision]} allowed"


@pytest.mark.skipif(DEVICE != "cpu", reason="of a CPU")
def test_cpu_detectors(compare):
    side, proposals = TIMED if compare.measures else CHECKED
    images = pictures(1, side)
    wanted = rows_of_the_run(compare.full, compare.measures)
    detectors = Detectors(images, side, proposals, wanted)
    same_in_float64(detectors.originals)
    models, providers, rows = {}, {}, {}
    for row in wanted:
        rows[row.name] = row.described()
        model = None if row.exported else detectors.model(row)
        providers[row.name] = model if isinstance(model, str) else detectors.call(row, model)
        if isinstance(model, str) or row.exported:
            continue
        models[row] = model
        if row.runtime != COMPILED:
            check_inside(detectors, row, model)
        if row.detector in (DOUBLE, EXT):
            with precision(row):
                rows[row.name] |= shares_of_rois(model, images)
            passing = rows[row.name]["passing"]
            assert row.rois != QUARTER or 0.2 <= passing <= 0.3, f"{row.name}: {passing:.0%} of the RoIs pass"
    for one, other in combinations(sorted({row.family for row in models}), 2):
        if one[0] != other[0]:
            assert shared(detectors.reference(one), detectors.reference(other)) < BY_CHANCE
    stages_ms = {}
    if compare.measures:
        whole = {row: model for row, model in models.items() if row.runtime != COMPILED}
        stages_ms = {row.name: shares(model, providers[row.name], 1) for row, model in whole.items()}
    record = compare(
        op="detector",
        case=CASE,
        details={"batch": 1, "side": side, "rows": rows, "stages_ms": stages_ms},
        providers=providers,
        check=lambda actual, expected: check(detectors, *actual),
        budget=150.0,
        min_rounds=2,  # and the calls before, of those that take more than a second
    )
    if record is not None:
        for name, result in record["providers"].items():
            if "median_ms" in result:
                result["images_per_second"] = round(1e3 / result["median_ms"], 3)
            if rows[name]["runtime"] in EXPORTED and "peak_mib" in result:
                result["peak_mib"] = None  # these keep their memory from call to call
        for line in targets_lines(record):
            compare.note(line)
        if compare.records:
            harness.write_record("detector", record, DEVICE)
