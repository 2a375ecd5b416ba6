"""How the benchmarks time a GPU, tried without one. The bytes that floors come from: test_floors.py."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.support.paths import BENCHMARKS

pytest.importorskip("torchvision")
sys.path.insert(0, str(BENCHMARKS))

import gpu_timing  # noqa: E402
from headline_child import medians  # noqa: E402


class Clock:
    """A device whose time is told by what it was given to do, which it writes down."""

    def __init__(self) -> None:
        self.time, self.told = 0.0, []

    def work(self, name: str, seconds: float) -> None:
        self.told.append(name)
        self.time += seconds

    def flush(self) -> None:
        self.work("flush", 1.0)

    def wait(self) -> None:
        self.told.append("wait")

    def mark(self) -> float:
        self.told.append("mark")
        return self.time

    def seconds(self, begin: float, end: float) -> float:
        return end - begin


@pytest.mark.parametrize(
    ("sample", "order"),
    [
        (gpu_timing.eager_sample, ["flush", "wait", "mark", "call", "mark"]),
        (gpu_timing.queued_sample, ["wait", "flush", "mark", "call", "mark"]),
    ],
)
def test_each_sample_begins_with_a_cold_cache_that_is_not_timed(sample, order):
    device = Clock()
    for _ in range(3):
        device.told.clear()
        assert sample(lambda: device.work("call", 0.25), device) == 0.25
        assert device.told == order


def test_the_devices_own_time_is_taken_behind_enough_work_to_hide_the_host():
    device = Clock()
    assert gpu_timing.device_seconds(lambda: device.work("call", 2.5), device, samples=1) == 2.5
    last = len(device.told) - 1 - device.told[::-1].index("wait")
    assert device.told[last:].count("flush") * 1.0 > 2.5


def test_providers_take_turns():
    told = []
    calls = {name: lambda name=name: told.append(name) for name in ("ours", "peer")}
    medians(calls, lambda call: call() or 1e-3, 0.05)
    assert told[:4] == ["ours", "peer", "ours", "peer"]


def test_all_are_graphs_or_none_is():
    calls = {"ours": lambda: 1, "peer": lambda: 2}

    def refuse(call):
        if call is calls["peer"]:
            raise RuntimeError("cannot record\nmore")
        return lambda: call()

    way, found = gpu_timing.alike(calls, capture=lambda call: lambda: 10 * call(), waits=lambda _: False)
    assert way == "graphs" and [call() for call in found.values()] == [10, 20]
    way, found = gpu_timing.alike(calls, capture=refuse, waits=lambda _: False)
    assert way == "eager: peer cannot be captured (cannot record)" and found is calls
    way, found = gpu_timing.alike(calls, capture=refuse, waits=lambda call: call is calls["ours"])
    assert way == "eager: ours waits for the device" and found is calls
    for way, sample in (("graphs", "wait"), ("eager: why", "flush")):
        device = Clock()
        gpu_timing.sampler(way, device)(lambda: None)
        assert device.told[0] == sample


def test_the_state_of_the_device_is_read_and_never_set():
    asked = []

    def run(command, **_):
        asked.extend(command)
        return SimpleNamespace(stdout="345, 3201, 1980, 78.33, 700.00, 36, P0\n")

    state = gpu_timing.device_state(run)
    assert state["sm_mhz"] == 345 and state["watts"] == 78.33 and state["pstate"] == "P0"
    assert [word for word in asked if word.startswith("-") and not word.startswith(("--query-gpu=", "--format="))] == []

    def missing(*_, **__):
        raise FileNotFoundError

    def failing(*_, **__):
        raise subprocess.CalledProcessError(9, "nvidia-smi")

    assert gpu_timing.device_state(missing) is None and gpu_timing.device_state(failing) is None


def test_share_of_the_floor():
    assert gpu_timing.share_of_floor(4_000_000, 1e-6, 4e12) == 1.0
    assert gpu_timing.share_of_floor(4_000_000, 4e-6, 4e12) == 0.25
