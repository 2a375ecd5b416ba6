"""Tables of the detectors on a CPU (`cpu_rows`): every row, and the targets."""

from __future__ import annotations

from typing import Any

from cpu_rows import CASE, DETECTORS, EAGER, ROWS, TARGETS, words
from tables import describe, grouped, markdown, number, times

STAGES = ("backbone", "rpn", "roi, heads")
"""Stages that have a column: the others take under one percent on a CPU."""
NOTHING = "Not measured yet."


def recorded(cases: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The record of all rows, if there is one."""
    return next((case for case in cases if case["case"] == CASE and "rows" in case["details"]), None)


def rows_table(case: dict[str, Any]) -> str:
    """Every row: images a second, latency, memory, and where the time goes; then what was not measured, and why."""
    providers, rows = case["providers"], case["details"]["rows"]
    eager = [row.name for row in ROWS if row.runtime == EAGER and "median_ms" in providers.get(row.name, {})]
    lines, missing = [], {}
    for name, row in rows.items():
        result = providers[name]
        if "missing" in result:
            missing[words(row)] = result["missing"]
            continue
        spent = case["details"]["stages_ms"].get(name, {})
        share = f" ({row['share']:.0%} got some)" if "share" in row else ""
        lines.append(
            [
                DETECTORS[row["detector"]], row["runtime"], row["precision"], row["rois"] + share,
                number(result["images_per_second"]), number(result["median_ms"]), number(result["p99_ms"]),
                *(times(providers[peer]["median_ms"] / result["median_ms"]) for peer in eager),
                number(result["peak_mib"]),
                *(f"{spent.get(stage, 0) / sum(spent.values()):.0%}" if spent else "" for stage in STAGES),
            ]
        )  # fmt: skip
    against = [f"to torchvision {rows[peer]['precision']}" for peer in eager]
    header = ["", "runs by", "precision", "boxes for", "images/s", "p50 ms", "p99 ms", *against, "peak MiB", *STAGES]
    table = markdown(header, lines)
    return "\n".join([*table, "", *grouped(missing), *([""] if missing else []), f"{describe([case])}."])


def verdicts(case: dict[str, Any]) -> list[list[str]]:
    """Target by target: what, against what, what was aimed at, what was measured, met or missed or why not measured."""
    known = {row.name: words(row.described()) for row in ROWS}
    lines = []
    for target in TARGETS:
        measured, verdict = target.verdict(case["providers"])
        lines.append([known[target.ours], known[target.peer], f"{target.ratio:g}x", times(measured), verdict])
    return lines


def targets_table(cases: list[dict[str, Any]]) -> str:
    """The targets as a table."""
    case = recorded(cases)
    if case is None:
        return NOTHING
    lines = markdown(["", "against", "target", "measured", ""], verdicts(case))
    return "\n".join([*lines, "", f"{describe([case])}."])


def targets_lines(case: dict[str, Any]) -> list[str]:
    """The targets as lines for a terminal."""
    return [f"{ours} / {peer}: {aim} wanted, {measured.strip('*') or '-'}, {verdict}"
            for ours, peer, aim, measured, verdict in verdicts(case)]  # fmt: skip


def summary_rows(case: dict[str, Any], shown: list[tuple[str, str]]) -> tuple[list[list[Any]], list[str]]:
    """README.md's lines (words, peer, its and our milliseconds) of pairs of rows, and what of them was not measured."""
    providers = case["providers"]
    lines, missing = [], {}
    for ours, peer in shown:
        names = [words(case["details"]["rows"][name]) for name in (ours, peer) if name in providers]
        if len(names) < 2:
            continue
        found = [providers[name] for name in (ours, peer)]
        reasons = {name: result["missing"] for name, result in zip(names, found, strict=True) if "missing" in result}
        missing |= reasons
        if not reasons:
            lines.append([*names, found[1]["median_ms"], found[0]["median_ms"]])
    return lines, grouped(missing)
