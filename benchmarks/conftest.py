"""`compare`: the fixture in which every benchmark checks, then times, then records.

pytest benchmarks --benchmark-disable              checks alone, each provider runs once
pytest benchmarks --benchmark-only                 the headline cases, some minutes; a table of ratios at the end
pytest benchmarks --benchmark-only --full          every case and provider
pytest benchmarks --benchmark-only --full --record the same, and writes benchmarks/results/
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `import harness`, whatever pytest's import mode

import gpu_timing  # noqa: E402
import harness  # noqa: E402
from inputs import DEVICE  # noqa: E402
from selection import headline_only  # noqa: E402

ROWS: pytest.StashKey[list[str]] = pytest.StashKey()
"""The lines of the table at the end."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("doublehead's benchmarks")
    group.addoption("--full", action="store_true", help="every case, not the headline ones alone")
    group.addoption("--record", action="store_true", help="write what is measured to benchmarks/results/")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without --full, only the headline cases are timed. Where nothing is timed, all are checked."""
    if not config.getoption("benchmark_only", False) or config.getoption("full"):
        return
    here = [item for item in items if "compare" in getattr(item, "fixturenames", ())]
    left_out = {item for item in here if not headline_only(item.originalname, parameters_of(item))}
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


def parameters_of(item: pytest.Item) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


@pytest.hookimpl(trylast=True)  # behind pytest-benchmark's own table
def pytest_terminal_summary(terminalreporter) -> None:
    rows = terminalreporter.config.stash.get(ROWS, [])
    if not rows:
        return
    terminalreporter.section("times as fast as the others")
    for row in rows:
        terminalreporter.write_line(row)


@pytest.fixture
def compare(benchmark, request) -> Callable[..., dict[str, Any] | None]:
    """compare(op=, case=, providers=, ...): equal results first, then time and memory side by side."""
    began = time.perf_counter()
    full = bool(request.config.getoption("full"))

    def run(
        *,
        op: str,
        case: str,
        providers: dict[str, Callable[[], Any] | str],
        check: Callable[[Any, Any], None] = torch.testing.assert_close,
        details: dict[str, Any] | None = None,
        bytes_moved: int | None = None,
        budget: float | None = None,
        min_rounds: int | None = None,
        graphs: bool = False,
    ) -> dict[str, Any] | None:
        """Check and measure `providers`: name -> call, or name -> the reason why it is missing.

        Every provider's result is checked against the first one's with `check(actual, expected)`.
        `details` (sizes, thresholds, ...) is recorded as given.  `bytes_moved`: what the operator
        must read and write at least, from which a GPU's share of its copy bandwidth follows.
        `budget`: seconds of sampling, in `min_rounds` at least.  `graphs`: on a GPU, all as CUDA graphs if each can be
        captured; not for calls that run autograd's backward, which a graph made outside of the capture refuses.
        Returns the record, or None where benchmarks are disabled.
        """
        calls = {name: call for name, call in providers.items() if callable(call)}
        oracle, *others = calls
        expected = calls[oracle]()
        for name in others:
            check(calls[name](), expected)
        ours = calls["doublehead"]
        if not benchmark.enabled:
            benchmark(ours)
            return None
        if budget is None:
            budget = 1.0 if DEVICE == "cuda" else 10.0 if full else 3.0
        if min_rounds is None:
            min_rounds = 5 if full else 3
        times, way = measured(calls, check, expected, graphs, budget, min_rounds, bytes_moved)
        benchmark.pedantic(ours, rounds=5 if full else 1)  # pytest-benchmark's own table; the record is ours
        results = {name: times.get(name, {"missing": reason}) for name, reason in providers.items()}
        record = {
            "case": case,
            "details": (details or {}) | ({"bytes_moved": bytes_moved} if bytes_moved else {}),
            "providers": results,
            "speedup": _speedups(times, "median_ms"),
            **({"kernel_speedup": _speedups(times, "kernel_ms")} if DEVICE == "cuda" else {}),
            "environment": harness.environment(DEVICE) | way,
        }
        _show(request, record, op, time.perf_counter() - began)
        if run.records:
            harness.write_record(op, record, DEVICE)
        return record

    run.measures = benchmark.enabled  # False: results are checked, nothing is timed
    run.full = full
    run.note = request.config.stash[ROWS].append  # a line of one's own in the table at the end
    run.records = bool(request.config.getoption("record")) and benchmark.enabled
    return run


def measured(
    calls: dict[str, Callable[[], Any]],
    check: Callable[[Any, Any], None],
    expected: Any,
    graphs: bool,
    budget: float,
    min_rounds: int,
    bytes_moved: int | None,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Each provider's numbers, and how and in which state of the device they were taken."""
    if DEVICE != "cuda":
        times = harness.time_side_by_side(calls, budget=budget, min_rounds=min_rounds, warm=True)
        for name, call in calls.items():
            times[name]["peak_mib"] = harness.peak_memory_mib(call, DEVICE)
        return times, {}
    device = gpu_timing.Cuda()
    way, timed = gpu_timing.alike(calls) if graphs else ("eager", calls)
    if way == "graphs":
        for call in timed.values():
            check(call(), expected)
    before = gpu_timing.device_state()
    sample = gpu_timing.sampler(way, device)
    times = harness.time_side_by_side(timed, budget=budget, min_rounds=min_rounds, sample=sample)
    after = gpu_timing.device_state()
    del timed
    for name, call in calls.items():
        times[name]["peak_mib"] = harness.peak_memory_mib(call, DEVICE)
        times[name] |= on_gpu(call, device, bytes_moved)
    return times, {"timed_as": way, "state_before": before, "state_after": after}


def on_gpu(call: Callable[[], Any], device: Any, bytes_moved: int | None) -> dict[str, float | None]:
    """The kernels' own time of a call and, where the bytes are known, the share of the copy bandwidth."""
    kernel_ms = gpu_timing.kernel_milliseconds(call, device)
    if kernel_ms is None or bytes_moved is None:
        return {"kernel_ms": kernel_ms}
    share = gpu_timing.share_of_floor(bytes_moved, kernel_ms / 1e3, gpu_timing.copy_bytes_per_second())
    return {"kernel_ms": kernel_ms, "share_of_copy_bandwidth": share}


def _speedups(times: dict[str, dict[str, Any]], key: str) -> dict[str, float]:
    """How many times faster doublehead is than each of the others."""
    ours = times["doublehead"].get(key)
    others = {name: result.get(key) for name, result in times.items() if name != "doublehead"}
    return {name: round(value / ours, 2) for name, value in others.items() if value and ours}


def _show(request: pytest.FixtureRequest, record: dict[str, Any], op: str, seconds: float) -> None:
    """A line now, seen without -s, and the same in the table at the end; with -v every provider's numbers."""
    ratios = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in record["speedup"].items()) or "alone"
    ours = record["providers"]["doublehead"]["median_ms"]
    label = record["case"] if op in record["case"] else f"{op}: {record['case']}"
    row = f"{label[:74]:74s} {ours:10.3f} ms   {ratios}"
    request.config.stash[ROWS].append(row)
    reporter = request.config.pluginmanager.getplugin("terminalreporter")
    if reporter is None:
        return
    lines = [f"\n{row}   ({seconds:.0f} s)"]
    if request.config.getoption("verbose") >= 1:
        lines += [_provider_line(name, result) for name, result in record["providers"].items()]
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():  # now, without -s
        for line in lines:
            reporter.write_line(line, flush=True)


def _provider_line(name: str, result: dict[str, Any]) -> str:
    if "missing" in result:
        return f"  {name:20s} missing: {result['missing']}"
    return (
        f"  {name:20s} {result['median_ms']:10.3f} ms  [{result['q20_ms']:.3f} .. {result['q80_ms']:.3f}]"
        f"  peak {result['peak_mib']} MiB" + (f"  kernels {result['kernel_ms']} ms" if "kernel_ms" in result else "")
    )
