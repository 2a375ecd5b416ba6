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
        device: str = "cpu",
        budget: float = 10.0,
        min_rounds: int = 5,
    ) -> dict[str, Any] | None:
        """Check and measure `providers`: name -> call, or name -> the reason why it is missing.

        Every provider's result is checked against the first one's with `check(actual, expected)`.
        `details` (sizes, thresholds, ...) is recorded as given.  Returns the record, or None
        where benchmarks are disabled.
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
            times[name]["peak_mib"] = harness.peak_memory_mib(call, device)
        benchmark.pedantic(ours, rounds=5)  # pytest-benchmark's own table; the record is ours
        results = {name: times.get(name, {"missing": reason}) for name, reason in providers.items()}
        record = {
            "case": case,
            "details": details or {},
            "providers": results,
            "speedup": _speedups(times),
            "environment": harness.environment(device),
        }
        _show(request, record)
        if request.config.getoption("benchmark_only"):
            harness.write_record(op, record, device)
        return record

    run.measures = benchmark.enabled  # False: results are checked, nothing is timed
    return run


def _speedups(times: dict[str, dict[str, float]]) -> dict[str, float]:
    """How many times faster doublehead is than each of the others (medians)."""
    ours = times["doublehead"]["median_ms"]
    return {name: round(result["median_ms"] / ours, 2) for name, result in times.items() if name != "doublehead"}


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
            f"  peak {result['peak_mib']} MiB" + (f"  doublehead is {factor:.1f}x" if factor else "")
        )
