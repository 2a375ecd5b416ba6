"""Tables and plots of the recorded results in benchmarks/results/<machine>/*.json.

python benchmarks/plot.py           rewrites benchmarks/RESULTS.md, the tables in README.md and docs/benchmarks.md, and
                                    docs/speed-<machine>.png
python benchmarks/plot.py --check   writes nothing; lists what is out of date, and then exits with 1
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from cpu_rows import BF16, DOUBLE, EXT, FC, INT8, INT8_BF16, OPENVINO
from cpu_tables import recorded, rows_table, summary_rows, targets_table
from tables import describe, markdown, number, times

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PEER, OURS = "torchvision", "doublehead"

HEADLINES = {
    "nms, 4000 boxes, threshold 0.7": "`nms`, 4,000 boxes, threshold 0.7",
    "nms, 12000 boxes, threshold 0.7": "`nms`, 12,000 boxes, threshold 0.7",
    "nms, 200000 boxes, threshold 0.7": "`nms`, 200,000 boxes, threshold 0.7",
    "batched_nms, 80 classes x 1000 boxes, threshold 0.7": "`batched_nms`, 80 classes x 1,000 boxes, threshold 0.7",
    "batched_nms, 80 classes x 1000 boxes, threshold 0.5": "the same, threshold 0.5",
    "forward 7x7 channels_last": "`MultiScaleRoIAlign` forward, channels-last",
    "forward 7x7 nchw": "the same, NCHW",
    "backward 7x7 channels_last": "`MultiScaleRoIAlign` backward, channels-last",
    "backward 7x7 nchw": "the same, NCHW",
}
"""Case -> its name in docs/benchmarks.md; RESULTS.md has all cases."""

MODULES = "the same modules in PyTorch"
HEADS = {
    "conv-head inference": ("conv-head, inference", "reference", MODULES),
    "conv-head training step": ("conv-head, training step", "reference", MODULES),
    "conv-head training step, recompute": ("the same, `recompute`", "reference", MODULES),
    "double_head with the exact skip": ("`double_head`, a quarter of the RoIs passes", "reference", MODULES),
    "non-local block, dot_product, 4 groups, inference": ("non-local block, inference", "reference", MODULES),
    "non-local block, dot_product, 4 groups, training": ("non-local block, training step", "reference", MODULES),
    "detections: 1 x 1000 RoIs x 81 classes, two heads": (
        "two heads' logits to 100 detections, 81 classes",
        "torchvision, nms per class",
        "torchvision, class by class",
    ),
}
"""The same for what is no operator of torchvision: case -> its words, whom it is compared with, the peer's words."""

DETECTORS = {
    "torchvision": "torchvision's `fasterrcnn_resnet50_fpn`",
    "doublehead": "the same, accelerated",
    "fc kind": "the same weights converted, kind `fc`",
}
"""Provider of a whole detector -> its words."""


SUMMARY_DETECTORS = [
    ("doublehead", PEER),
    (f"doublehead, {BF16}", f"{PEER}, {BF16}"),
    (EXT, PEER),
    (f"{EXT}, {INT8}", PEER),
    (f"{EXT}, {BF16}", PEER),
    (f"{EXT}, {INT8_BF16}", PEER),
    (f"{EXT}, a quarter, {INT8_BF16}", f"{PEER}, {BF16}"),
    (f"{DOUBLE}, a quarter", PEER),
    (f"{DOUBLE}, a quarter, {BF16}", f"{PEER}, {BF16}"),
    (FC, f"{FC}, {OPENVINO}"),
    (EXT, f"{EXT}, {OPENVINO}"),
    (f"{EXT}, a quarter", f"{EXT}, {OPENVINO}"),
]
"""README.md's rows of whole detectors on a CPU: a row of cpu_rows.py, and the one it is compared with."""

SUMMARY_CPU = {
    "batched_nms, 80 classes x 1000 boxes, threshold 0.7": {"doublehead": ("`batched_nms`, 80 x 1,000 boxes", PEER)},
    "forward 7x7 channels_last": {"doublehead": ("`MultiScaleRoIAlign` forward, 512 RoIs", PEER)},
    "conv-head inference": {"doublehead": ("conv-head, inference, 200 RoIs", "reference")},
    "conv-head training step": {"doublehead": ("conv-head, training step, 200 RoIs", "reference")},
}
"""README.md's rows on a CPU: case -> whose time is shown -> its words, whom it is compared with."""

EAGER = "torchvision's Faster R-CNN, eager"
SUMMARY_GPU = {
    "nms_80x1000": ("`batched_nms`, 80 x 1,000 boxes", PEER),
    "roi_forward": ("`MultiScaleRoIAlign` forward, 512 RoIs", PEER),
    "conv_head": ("conv-head, inference, bf16, 1,000 RoIs", MODULES),
    "conv_head_training": ("conv-head, training step, bf16, 1,000 RoIs", MODULES),
    "fc_1": ("kind `fc`, one image, bf16, as a CUDA graph", EAGER),
    "ext_1": ("Double-Head-Ext, one image, bf16, as a CUDA graph", EAGER),
}
"""README.md's rows on a GPU: row of benchmarks/headline.py -> its words, whom it is compared with."""


def load(machine: Path) -> list[dict[str, Any]]:
    """All cases recorded on one machine, op by op, each with its op."""
    records = [json.loads(path.read_text()) for path in sorted(machine.glob("*.json"))]
    return [{"op": record["op"], **case} for record in records for case in record["cases"]]


def title(case: dict[str, Any]) -> str:
    """What a case is called where nothing says which op it is of."""
    return case["case"] if case["op"] in case["case"] or case["op"] == "nms" else f"{case['op']} {case['case']}"


def table(cases: list[tuple[str, dict[str, Any]]], provider: str = PEER) -> list[str]:
    """Times, ratio and peak memory of a provider and of ours; from a GPU also what the kernels did."""
    on_gpu = any("kernel_ms" in case["providers"][OURS] for _, case in cases)
    rows = [[label, *compared(case, provider, on_gpu)] for label, case in cases]
    return markdown(["", *columns(provider, on_gpu)], rows)


def columns(peer: str, on_gpu: bool) -> list[str]:
    """The names of what `compared` gives."""
    names = [f"{peer} ms", "doublehead ms", "ratio", f"{peer} MiB", "doublehead MiB"]
    return names + (["kernels ms", "ratio of kernels", "of copy bandwidth"] if on_gpu else [])


def compared(case: dict[str, Any], provider: str, on_gpu: bool) -> list[str]:
    """The cells of one case: a provider beside ours."""
    theirs, ours = case["providers"].get(provider, {}), case["providers"][OURS]
    cells = [number(theirs.get("median_ms")), number(ours["median_ms"]), times(case["speedup"].get(provider))]
    cells += [number(theirs.get("peak_mib")), number(ours.get("peak_mib"))]
    if on_gpu:
        share = ours.get("share_of_copy_bandwidth")
        cells += [number(ours.get("kernel_ms")), times(case["kernel_speedup"].get(provider))]
        cells += [f"{share:.0%}" if share else ""]
    return cells


def speed_table(cases: list[dict[str, Any]]) -> str:
    """The headline cases against torchvision."""
    known = {case["case"]: case for case in cases}
    shown = [(label, known[name]) for name, label in HEADLINES.items() if name in known]
    if not shown:
        return "Not measured yet."
    return "\n".join([*table(shown), "", f"Medians; {describe([case for _, case in shown])}."])


def heads_table(cases: list[dict[str, Any]]) -> str:
    """The heads' cases, each against its own peer."""
    known = {case["case"]: case for case in cases}
    shown = [(known[name], *words) for name, words in HEADS.items() if name in known]
    if not shown:
        return "Not measured yet."
    on_gpu = any("kernel_ms" in case["providers"][OURS] for case, *_ in shown)
    rows = [
        [f"{label}, {case['details']['rois']} RoIs", words, *compared(case, provider, on_gpu)]
        for case, label, provider, words in shown
    ]
    lines = markdown(["", "peer", *columns("peer", on_gpu)], rows)
    return "\n".join([*lines, "", f"Medians; {describe([case for case, *_ in shown])}."])


def detector_table(cases: list[dict[str, Any]]) -> str:
    """Whole detectors: images a second, latency, memory, and where the time goes."""
    if (on_cpu := recorded(cases)) is not None:
        return rows_table(on_cpu)
    shown = [case for case in cases if case["op"] == "detector" and "stages_ms" in case["details"]]
    if not shown:
        return "Not measured yet."
    stages = list(next(iter(shown[0]["details"]["stages_ms"].values())))
    rows = []
    for case in shown:
        first = case["providers"][PEER]["median_ms"]
        for name, result in case["providers"].items():
            spent = case["details"]["stages_ms"].get(name, {})
            rows.append(
                [
                    f"{DETECTORS.get(name, name)}, {case['details']['batch']} x {case['details']['side']} px, "
                    f"{case['details']['precision']}",
                    number(result["images_per_second"]), number(result["median_ms"]), number(result["p99_ms"]),
                    times(first / result["median_ms"]), number(result["peak_mib"]),
                    *(f"{spent[stage] / sum(spent.values()):.0%}" if spent else "" for stage in stages),
                ]
            )  # fmt: skip
    header = ["", "images/s", "p50 ms", "p99 ms", "to torchvision", "peak MiB", *stages]
    return "\n".join([*markdown(header, rows), "", f"{describe(shown)}."])


def summary_table(cpu: list[dict[str, Any]], gpu: dict[str, Any]) -> str:
    """README.md's table: what a CPU and a GPU give, gains and losses."""
    known = {case["case"]: case for case in cpu}
    rows, used, missing = [], [], []
    if (detectors := recorded(cpu)) is not None:
        pairs, missing = summary_rows(detectors, SUMMARY_DETECTORS)
        rows += [["CPU", words, peer, *versus(theirs, ours)] for words, peer, theirs, ours in pairs]
        used.append(detectors)
    for name in filter(known.get, SUMMARY_CPU):
        providers = known[name]["providers"]
        for provider, (words, peer) in SUMMARY_CPU[name].items():
            whom = MODULES if peer == "reference" else peer
            cells = versus(providers[peer]["median_ms"], providers[provider]["median_ms"])
            rows.append(["CPU", words, whom, *cells])
        used.append(known[name])
    measured = {row["row"]: row for row in gpu.get("rows", []) if row["status"] == "measured"}
    for name in filter(measured.get, SUMMARY_GPU):
        row = measured[name]
        rows.append(["GPU", *SUMMARY_GPU[name], *versus(row["peer_us"] / 1000, row["ours_us"] / 1000)])
    where = [f"CPU: {describe(used)}."] if used else []
    if gpu:
        where.append(f"GPU: {gpu['processor']}; torch {gpu['torch']}; {gpu['date']}, commit {gpu['commit']}.")
    table = markdown(["", "", "peer", "peer ms", "doublehead ms", "ratio"], rows)
    return "\n".join([*table, "", " ".join(["Medians.", *where, *missing])])


def versus(theirs: float, ours: float) -> list[str]:
    """The cells of two times in milliseconds and of their ratio."""
    return [number(theirs), number(ours), times(theirs / ours)]


def results_page(machines: dict[str, list[dict[str, Any]]]) -> str:
    """Everything recorded, as one page."""
    parts = [
        "# All recorded results",
        "",
        "Written by `python benchmarks/plot.py`; medians, in milliseconds and MiB.",
        "",
    ]
    for machine, cases in machines.items():
        parts += [f"## {machine}", "", f"{describe(cases)}.", ""]
        detectors = recorded(cases)
        if detectors is not None:
            parts += ["Whole detectors:", "", rows_table(detectors), ""]
        others = [case for case in cases if case is not detectors]
        providers = {name for case in others for name in case["speedup"] if not name.startswith(f"{OURS}, ")}
        for provider in sorted(providers, key=lambda name: (name != PEER, name)):
            shown = [(title(case), case) for case in others if provider in case["speedup"]]
            parts += [f"Against {provider}:", "", *table(shown, provider), ""]
    return "\n".join(parts)


def draw(cases: list[dict[str, Any]], path: Path) -> None:
    """A bar for every case: how many times faster than torchvision."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [(title(case), case["speedup"][PEER]) for case in cases if PEER in case["speedup"]][::-1]
    figure, axes = plt.subplots(figsize=(10, 0.8 + 0.28 * len(shown)), layout="constrained")
    bars = axes.barh([name for name, _ in shown], [ratio for _, ratio in shown], color="0.45")
    axes.bar_label(bars, [f"{number(ratio)}x" for _, ratio in shown], padding=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.margins(x=0.12, y=0.01)
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.set_xlabel("times as fast as torchvision")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def marked(text: str, name: str, table: str) -> str:
    """`text` with `table` between the marks of this name; as it is where there are none."""
    begin, end = f"<!-- {name} begin -->", f"<!-- {name} end -->"
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{table}\n{end}", text, flags=re.DOTALL)


def pages() -> dict[Path, str]:
    """Every text this script writes: path -> content."""
    machines = {path.name: load(path) for path in sorted(RESULTS.iterdir()) if path.is_dir()}
    readme, page = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
    headlines = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("headline-*.json"))]
    summary = summary_table(machines.get("cpu", []), headlines[0] if headlines else {})
    text = page.read_text()
    for machine, cases in machines.items():
        text = marked(text, f"speed {machine}", speed_table(cases))
        text = marked(text, f"heads {machine}", heads_table(cases))
        text = marked(text, f"detector {machine}", detector_table(cases))
        text = marked(text, f"targets {machine}", targets_table(cases))
    return {
        readme: marked(readme.read_text(), "summary", summary),
        page: text,
        ROOT / "benchmarks" / "RESULTS.md": results_page(machines),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say what is out of date")
    check = parser.parse_args().check
    stale = [path for path, text in pages().items() if not path.exists() or path.read_text() != text]
    if check:
        for path in stale:
            print(f"{path.relative_to(ROOT)} does not show the recorded results: run python benchmarks/plot.py")
        sys.exit(1 if stale else 0)
    for path, text in pages().items():
        path.write_text(text)
    for machine in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        cases = load(machine)
        if any(PEER in case["speedup"] for case in cases):
            draw(cases, ROOT / "docs" / f"speed-{machine.name}.png")


if __name__ == "__main__":
    main()
