"""How the whole suite is divided among processes (pytest-xdist); a part of it, named to pytest, runs in one."""

from __future__ import annotations

import os

import pytest

MOST = 4
"""Processes, of some gigabytes each."""

LONGEST_FIRST = (
    "tests/exporting/test_export.py",
    "tests/benchmarks/test_fused_training.py",
    "tests/ops/test_non_local_compiled.py",
    "tests/benchmarks/test_smoke.py",
    "tests/exporting/test_onnx.py",
    "tests/analysis/test_sliding_windows.py",
    "tests/test_journey.py",
    "tests/models/test_static.py",
    "tests/building/test_budgets.py",
    "tests/faults/test_kills.py",
    "tests/benchmarks/test_bare_machine.py",
)
"""The files whose tests take longest, begun first: a process that began one last would work on alone."""


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def divide(config: pytest.Config, cores: int) -> int:
    """Give every core that the whole suite may use a process of its own, with the tests of a file in one of them.

    Nothing is divided if pytest is told which files to run, in how many processes (`-n 0`), to let a debugger or the
    tests' output through, or only to collect; nor without pytest-xdist.

    Returns:
        The number of processes, 0 if pytest's own runs the tests.
    """
    if hasattr(config, "workerinput"):  # already one of several: it would divide its own part, and each of those again
        return 0
    option = config.option
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    alone = option.usepdb or option.trace or option.capture == "no" or option.collectonly
    processes = min(cores, MOST)
    if not whole or alone or processes < 2 or getattr(option, "numprocesses", 0) is not None:
        return 0
    option.numprocesses, option.dist, option.loadscopereorder = processes, "loadfile", False
    # Threads of torch beyond the cores wait for each other; what is about threads sets their number itself.
    os.environ.setdefault("OMP_NUM_THREADS", str(cores // processes))
    return processes


def longest_first(items: list[pytest.Item]) -> None:
    """Put the tests of `LONGEST_FIRST` in front; the others keep their order."""
    place = {name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(place)))
