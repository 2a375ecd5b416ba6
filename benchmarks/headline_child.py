"""The process of `headline.py` that measures. It reports to its parent in lines."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import gpu_timing
import torch

Call = Callable[[], Any]

SECONDS, TINY_SECONDS = 0.5, 0.02
"""Seconds of sampling, both sides together."""


class Host:
    """Replaces `gpu_timing.Cuda` on a CPU: no cache is flushed, and nothing waits."""

    def flush(self) -> None: ...

    def wait(self) -> None: ...

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, begin: float, end: float) -> float:
        return end - begin


def medians(calls: dict[str, Call], sample: Callable[[Call], float], seconds: float) -> dict[str, float]:
    """Side by side, in turns: at least 3 samples each, at most 200."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for turn in range(200):
        if turn >= 3 and time.perf_counter() - began > seconds:
            break
        for name, call in calls.items():
            taken[name].append(sample(call))
    return {name: statistics.median(values) for name, values in taken.items()}


def measure(make: Callable[[bool], Any], small: bool, on_gpu: bool) -> dict[str, Any]:
    """Check and time one row."""
    device = gpu_timing.Cuda() if on_gpu else Host()
    case = make(small)
    case.check(case.ours(), case.peer())
    calls = {"ours": case.ours, "peer": case.peer}
    way = case.way or "both eager"
    if case.graphs and on_gpu:
        way, calls = gpu_timing.alike(calls)
        if way == "graphs":
            way = "both as graphs"
            case.check(calls["ours"](), calls["peer"]())
    for call in calls.values():
        call()
    times = medians(
        calls,
        gpu_timing.sampler("graphs" if way == "both as graphs" else "eager", device),
        TINY_SECONDS if small else SECONDS,
    )
    row = {
        "ours_us": times["ours"] * 1e6,
        "peer_us": times["peer"] * 1e6,
        "ratio": times["peer"] / times["ours"],
        "way": way,
        "tiny": small,
    }
    if case.bytes_moved:
        row["bytes_moved"] = case.bytes_moved
    if case.alone is not None:
        spent = gpu_timing.device_seconds(case.alone, device, 3 if small else 20)
        row["device_us"] = spent * 1e6
        if case.bytes_moved and on_gpu:
            bandwidth = gpu_timing.copy_bytes_per_second()
            row["share_of_floor"] = gpu_timing.share_of_floor(case.bytes_moved, spent, bandwidth)
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}


def child(options: argparse.Namespace, mark: str, seconds: dict[str, float]) -> int:
    """Measure `options.rows`; one whose `seconds` do not fit before `options.child`, a time of day, is skipped."""

    def tell(**message: Any) -> None:
        print(mark + json.dumps(message), flush=True)

    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        tell(nothing="no GPU: nothing measured")
        return 0
    import harness
    from headline_rows import ROWS

    about = harness.environment("cuda" if on_gpu else "cpu")
    if on_gpu:
        about |= {"state_before": gpu_timing.device_state(), "copy_gb_per_s": gpu_timing.copy_bytes_per_second() / 1e9}
    tell(about=about)
    for key in options.rows:
        left = options.child - time.time()
        if seconds[key] > left:
            tell(row=key, status="skipped", why=f"needs {seconds[key]:g} s, {left:.0f} s are left")
            continue
        tell(begin=key)
        began = time.perf_counter()
        try:
            row = {"status": "measured"} | measure(ROWS[key], options.small, on_gpu)
        except Exception as error:
            traceback.print_exc()
            row = {"status": "failed", "why": f"{type(error).__name__}: {error}".replace("\n", " ")[:500]}
        tell(row=key, **row, seconds=round(time.perf_counter() - began, 1))
        if on_gpu and row["status"] == "failed":
            try:
                torch.cuda.synchronize()
            except RuntimeError:  # the device refuses everything from now on: only a new process helps
                return 3
    if on_gpu:
        tell(about={"state_after": gpu_timing.device_state()})
    sys.stdout.flush()
    return 0
