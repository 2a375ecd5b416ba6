"""A cost model of the CUDA kernels that can be proved wrong: what a launch, a dependent instruction, an access and a
byte cost, times what the inputs of the benchmarks need of each.

    python benchmarks/model.py               # every row: both designs as the model has them and as they were measured
    python benchmarks/model.py --parts nms_4000 roi_backward

Four constants of the machine are fitted to the H200's measurements of 2026-11-26 (model_machine.py), and the speeds of
products to two rows (model_networks.py); the rest is published, or counted: from the compiled code by sass.py, from the
launch plans, from the boxes. `tests/benchmarks/test_model.py` holds it to
what was measured of the first design, and lists the rows of the second that it missed; NOTES.md says why. Nothing is
fitted to the second.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import model_decide as decide
import model_detections as detections
import model_networks as networks
import model_nms as nms
import model_roi_align as roi_align
from model_machine import H200, Machine, Step

RESULTS = Path(__file__).resolve().parent / "results"
FIRST = RESULTS / "first-design-nvidia-h200.json"
"""The measurements that the constants are fitted to."""
SECOND = RESULTS / "headline-nvidia-h200.json"
"""Those of the code that was predicted."""
WITH_HOST = {"conv_head_training"}
"""Rows whose eager time is modelled: the slower of host and device."""
ROIS = 1000

Steps = Callable[[Machine], list[Step]]


class Row(NamedTuple):
    """A row of headline.py: what it launches, as it was measured and as it is now."""

    title: str
    before: Steps
    after: Steps | None = None
    """None: nothing was redesigned, or the redesign is not modelled."""
    heavy: bool = False
    """Its boxes take long to replay."""


def work(steps: list[Step]) -> float:
    return sum(step.work for step in steps)


def detector(network: networks.Network, images: int, heads: Steps | None, now: bool = False, pooled: int = 2) -> Steps:
    """One graph. Its launches are counted, and those of the steps not again. pooled: bytes of a number of the maps."""

    def steps(machine: Machine) -> list[Step]:
        found = detections.after if now else detections.before
        each = work(heads(machine)) if heads else 0.0
        pool = roi_align.forward if now else roi_align.forward_before
        pooling = work(pool(machine, 512, pooled)) * ROIS / 512 * (2 if heads else 1)
        proposals = decide.plain if now else nms.plain_before
        boxes = work(proposals(machine, 4000, 0.5)) + work(found(machine))
        return [Step("whole", networks.detector(machine, network, images, each, pooling, boxes) - machine.launch)]

    return steps


def forward(title: str, size: int) -> Row:
    return Row(
        title,
        lambda machine: roi_align.forward_before(machine, 512, size),
        lambda machine: roi_align.forward(machine, 512, size),
    )


def backward(title: str, count: int, size: int, images: int = 1) -> Row:
    return Row(
        title,
        lambda machine: roi_align.backward_before(machine, count, size, images),
        lambda machine: roi_align.backward(machine, count, size, images),
        heavy=images > 1,
    )


def plain_nms(title: str, count: int) -> Row:
    return Row(
        title,
        lambda machine: nms.plain_before(machine, count, 0.5),
        lambda machine: decide.plain(machine, count, 0.5),
        heavy=count > 4000,
    )


def conv_head(engines: dict[str, networks.Engine], size: int = networks.BF16) -> Steps:
    return lambda machine: networks.conv_head(machine, ROIS, engines, size)


TRITON, TRITON_FP32 = conv_head(networks.ALL_TRITON), conv_head(networks.ALL_TRITON_FP32, 4)
ENGINES, ENGINES_FP32 = conv_head(networks.ENGINES), conv_head(networks.ENGINES_FP32, 4)

ROWS = {
    "roi_forward": forward("RoIAlign forward, channels-last fp32", 4),
    "roi_forward_bf16": forward("  the same, bf16", 2),
    "roi_forward_nchw": Row(
        "  the same, NCHW fp32", lambda m: roi_align.planar_before(m, 512), lambda m: roi_align.planar(m, 512)
    ),
    "roi_backward": backward("RoIAlign backward, channels-last fp32", 512, 4),
    "roi_backward_bf16": backward("  the same, bf16", 512, 2),
    "roi_backward_1000": backward("  1000 boxes, fp32", 1000, 4),
    "roi_backward_16": backward("  16 images, fp32", 512, 4, images=16),
    "nms_4000": plain_nms("nms 4,000", 4000),
    "nms_12000": plain_nms("nms 12,000", 12000),
    "nms_80x1000": Row("batched_nms 80 x 1,000", nms.classes_before, decide.classes),
    "detections": Row("logits to 100 detections", detections.before, detections.after),
    "conv_head": Row("conv-head inference, bf16", TRITON, ENGINES),
    "conv_head_fp32": Row("  fp32 (TF32)", TRITON_FP32, ENGINES_FP32),
    "non_local": Row("non-local block, bf16", lambda m: networks.non_local(m, ROIS)),
    "conv_head_training": Row(
        "conv-head training step, bf16",
        lambda m: networks.training_step(m, networks.HOST_BEFORE),
        lambda m: networks.training_step(m, networks.HOST),
    ),
    "ext_1": Row(
        "Ext, batch 1, bf16",
        detector(networks.BEFORE, 1, TRITON),
        detector(networks.AFTER, 1, ENGINES, now=True),
    ),
    "ext_16": Row(
        "  batch 16",
        detector(networks.BEFORE, 16, TRITON),
        detector(networks.AFTER, 16, ENGINES, now=True),
    ),
    "ext_1_fp32": Row(
        "  batch 1, fp32",
        detector(networks.BEFORE_FP32, 1, TRITON_FP32, pooled=4),
        detector(networks.AFTER_FP32, 1, ENGINES_FP32, now=True, pooled=4),
    ),
    "fc_1": Row(
        "kind fc, batch 1, bf16",
        detector(networks.BEFORE_FC, 1, None),
        detector(networks.AFTER_FC, 1, None, now=True),
    ),
}


def total(steps: list[Step], machine: Machine = H200) -> float:
    """Microseconds of launches one after the other."""
    return sum(step.work + machine.launch for step in steps)


@functools.cache
def measured(record: Path = FIRST) -> dict[str, dict]:
    """A record's rows by name. `us`: the device's time; ours as one graph, or WITH_HOST, where that is modelled."""
    rows = {row["row"]: row for row in json.loads(record.read_text())["rows"]}
    return {
        name: row | {"us": row["ours_us"] if name in WITH_HOST else row.get("device_us", row["ours_us"])}
        for name, row in rows.items()
    }


def floor(row: dict) -> float | None:
    """The least time that the memory allows."""
    return row["bytes_moved"] / H200.dram if "bytes_moved" in row else None


def parts(steps: list[Step]) -> str:
    """Launches and work by name, the longest first."""
    work: dict[str, tuple[int, float]] = {}
    for step in steps:
        number, time = work.get(step.name, (0, 0.0))
        work[step.name] = (number + 1, time + step.work)
    ordered = sorted(work.items(), key=lambda item: -item[1][1])
    named = [f"{number} x {name} {time:.0f}" for name, (number, time) in ordered]
    counts = "".join(f"; {step.name}: {step.counts}" for step in steps if step.counts)
    return f"{len(steps)} launches {len(steps) * H200.launch:.0f}, " + ", ".join(named) + counts


def table(names: list[str], with_parts: bool = False) -> str:
    lines = [
        "| case (H200, us) | first design, measured | model of it | model / measured "
        "| second design, predicted | measured | measured / predicted | share of the floor |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name in names:
        row, was, found = ROWS[name], measured()[name], measured(SECOND)[name]
        before = total(row.before(H200))
        cells = [row.title, f"{was['us']:.0f}", f"{before:.0f}", f"{before / was['us']:.2f}"]
        if row.after:
            now = total(row.after(H200))
            least = floor(found)
            share = f"{least / now:.0%} predicted, {found['share_of_floor']:.0%}" if least else ""
            cells += [f"{now:.0f}", f"{found['us']:.0f}", f"{found['us'] / now:.2f}", share]
        else:
            cells += ["", f"{found['us']:.0f}", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
        if with_parts:
            empty = " |" * (len(cells) - 1)
            lines.append(f"| - {parts(row.before(H200))} |{empty}")
            if row.after:
                lines.append(f"| - second {parts(row.after(H200))} |{empty}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", default=list(ROWS), metavar="row", help=", ".join(ROWS))
    parser.add_argument("--parts", action="store_true", help="what the time goes to")
    asked = parser.parse_args()
    unknown = [row for row in asked.rows if row not in ROWS]
    if unknown:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    print(table(asked.rows, asked.parts))


if __name__ == "__main__":
    main()
