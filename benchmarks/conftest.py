"""`compare`: the fixture in which every benchmark checks, then times, then records.

pytest benchmarks --benchmark-disable     checks alone, each provider runs once
pytest benchmarks --benchmark-only        checks, times, writes benchmarks/results/
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `import harness`, whatever pytest's import mode

import harness  # noqa: E402
from inputs import DEVICE  # noqa: E402


@pytest.fixture
def compare(benchmark, request) -> Callable[..., dict[str, Any] | None]:
    """compare(op=, case=, providers=, ...): equal results first, then time and memory side by side."""

    def run(
        *,
        op: str,
        case: str,
        providers: dict[str, Callable[[], Any] | str],
        check: Callable[[Any, Any], None] = torch.testing.assert_close,
        details: dict[str, Any] | None = None,
        bytes_moved: int | None = None,
        budget: float = 10.0 if DEVICE == "cpu" else 1.0,
        min_rounds: int = 5,
    ) -> dict[str, Any] | None:
        """Check and measure `providers`: name -> call, or name -> the reason why it is missing.

        Every provider's result is checked against the first one's with `check(actual, expected)`.
        `details` (sizes, thresholds, ...) is recorded as given.  `bytes_moved`: what the operator
        must read and write at least, from which a GPU's share of its copy bandwidth follows.
        Returns the record, or None where benchmarks are disabled.
        """
        calls = {name: call for name, call in providers.items() if callable(call)}
        oracle, *others = calls
        expected = calls[oracle]()
        for name in others:
            check(calls[name](), expected)
        del expected
        ours = calls["doublehead"]
        if not benchmark.enabled:
            benchmark(ours)
            return None
        times = harness.time_side_by_side(calls, budget=budget, min_rounds=min_rounds)
        for name, call in calls.items():
            times[name]["peak_mib"] = harness.peak_memory_mib(call, DEVICE)
            if DEVICE == "cuda":
                times[name] |= on_gpu(call, bytes_moved)
        benchmark.pedantic(ours, rounds=5)  # pytest-benchmark's own table; the record is ours
        results = {name: times.get(name, {"missing": reason}) for name, reason in providers.items()}
        record = {
            "case": case,
            "details": (details or {}) | ({"bytes_moved": bytes_moved} if bytes_moved else {}),
            "providers": results,
            "speedup": _speedups(times, "median_ms"),
            **({"kernel_speedup": _speedups(times, "kernel_ms")} if DEVICE == "cuda" else {}),
            "environment": harness.environment(DEVICE),
        }
        _show(request, record)
        if request.config.getoption("benchmark_only"):
            harness.write_record(op, record, DEVICE)
        return record

    run.measures = benchmark.enabled  # False: results are checked, nothing is timed
    return run


def on_gpu(call: Callable[[], Any], bytes_moved: int | None) -> dict[str, float | None]:
    """The kernels' own time of a call and, where the bytes are known, the share of the copy bandwidth."""
    kernel_ms = harness.kernel_milliseconds(call)
    if kernel_ms is None or bytes_moved is None:
        return {"kernel_ms": kernel_ms}
    share = bytes_moved / (kernel_ms / 1e3) / harness.copy_bytes_per_second()
    return {"kernel_ms": kernel_ms, "share_of_copy_bandwidth": round(share, 4)}


def _speedups(times: dict[str, dict[str, Any]], key: str) -> dict[str, float]:
    """How many times faster doublehead is than each of the others."""
    ours = times["doublehead"].get(key)
    others = {name: result.get(key) for name, result in times.items() if name != "doublehead"}
    return {name: round(value / ours, 2) for name, value in others.items() if value and ours}


def _show(request, record: dict[str, Any]) -> None:
    reporter = request.config.pluginmanager.getplugin("terminalreporter")
    reporter.write_line(f"\n{record['case']}  {record['details']}")
    for name, result in record["providers"].items():
        if "missing" in result:
            reporter.write_line(f"  {name:20s} missing: {result['missing']}")
            continue
        factor = record["speedup"].get(name)
        reporter.write_line(
            f"  {name:20s} {result['median_ms']:10.3f} ms  [{result['q20_ms']:.3f} .. {result['q80_ms']:.3f}]"
            f"  peak {result['peak_mib']} MiB"
            + (f"  kernels {result['kernel_ms']} ms" if result.get("kernel_ms") else "")
            + (f"  doublehead is {factor:.1f}x" if factor else "")
        )
