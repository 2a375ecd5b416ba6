"""Timing on a GPU: with a cold L2, the same way for all providers, with the state of the device.

**Cold L2.** Before every sample a buffer of four times the L2 is read, so that a call finds none of its own data there.
Several input sets in rotation would do the same, but a CUDA graph always works on the memory it was captured with, and
would need a graph for every set. The buffer is read, not written: written lines would go back to memory during the
call and slow it down.

**Alike.** Either every provider is captured as a CUDA graph and replayed, or none is:
  graphs  the time between two events around the replay, which is launched while the buffer is still being read: the
          device's time, without the host's.
  eager   the time between two events around the call, on a device that was idle before: from the call to the end of
          its work, including the host's time and every wait.
A provider that waits for the device cannot be captured; then all of them are timed eagerly.
"""

from __future__ import annotations

import functools
import math
import statistics
import subprocess
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]

FLUSH = 4
"""How many times the L2 is read before a sample."""


class Cuda:
    """The device operations that the timing uses; tests replace them."""

    @functools.cached_property
    def _buffer(self) -> tuple[Tensor, Tensor]:
        l2 = torch.cuda.get_device_properties().L2_cache_size or 64 * 2**20
        rows, columns = 4096, math.ceil(FLUSH * l2 / 8 / 4096)
        buffer = torch.zeros(rows, columns, dtype=torch.int64, device="cuda")
        return buffer, torch.empty(rows, dtype=torch.int64, device="cuda")

    def flush(self) -> None:
        """One kernel, whose name no operator shares: the largest of each row of int64."""
        buffer, largest = self._buffer
        torch.amax(buffer, 1, out=largest)

    def wait(self) -> None:
        torch.cuda.synchronize()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def _between_marks(call: Call, device: Any) -> float:
    begin = device.mark()
    result = call()
    end = device.mark()
    seconds = device.seconds(begin, end)
    del result  # not before: to free memory takes time too
    return seconds


def eager_sample(call: Call, device: Any) -> float:
    """Seconds from the call, on an idle device with a cold L2, to the end of its work."""
    device.flush()
    device.wait()
    return _between_marks(call, device)


def queued_sample(call: Call, device: Any, flushes: int = 1) -> float:
    """Seconds of device work of a call that never waits, launched behind reads of the buffer."""
    device.wait()
    for _ in range(flushes):
        device.flush()
    return _between_marks(call, device)


def device_seconds(call: Call, device: Any, samples: int = 20) -> float:
    """Median device time of a call that never waits.

    So many reads of the buffer come first that the host has launched everything before the device begins.
    """
    host = statistics.median(eager_sample(call, device) for _ in range(3))
    flush = max(queued_sample(device.flush, device), 1e-6)
    flushes = min(100, 1 + math.ceil(1.5 * host / flush))
    return statistics.median(queued_sample(call, device, flushes) for _ in range(samples))


# ---------------------------------------------------------------------------------------------
# Alike


class Captured:
    """A call as a CUDA graph: `replay` runs it again on the same memory, and its result is overwritten."""

    def __init__(self, call: Call) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = call()

    def __call__(self) -> Any:
        self.graph.replay()
        return self.result


def waits(call: Call) -> bool:
    """Whether a call waits for the device, as far as PyTorch sees it; such a call cannot be captured."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error).lower():
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def alike(
    calls: dict[str, Call], *, capture: Callable[[Call], Call] = Captured, waits: Callable[[Call], bool] = waits
) -> tuple[str, dict[str, Call]]:
    """("graphs", every call as a graph), or ("eager: why", the calls as they are) if one of them cannot be captured."""
    for name, call in calls.items():
        if waits(call):
            return f"eager: {name} waits for the device", calls
    captured = {}
    for name, call in calls.items():
        try:
            captured[name] = capture(call)
        except Exception as error:
            return f"eager: {name} cannot be captured ({str(error).splitlines()[0][:120]})", calls
    return "graphs", captured


def sampler(way: str, device: Any) -> Callable[[Call], float]:
    """The sampling function for the mode that `alike` returned."""
    sample = queued_sample if way == "graphs" else eager_sample
    return lambda call: sample(call, device)


# ---------------------------------------------------------------------------------------------
# Floors


@functools.cache
def copy_bytes_per_second() -> float:
    """Bandwidth of the GPU's memory: a copy of 1 GiB, read and written, median of 20."""
    source = torch.zeros(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    device = Cuda()
    times = [eager_sample(lambda: target.copy_(source), device) for _ in range(25)]
    return 2 * 2**30 / statistics.median(times[5:])


def share_of_floor(bytes_moved: int, seconds: float, bytes_per_second: float) -> float:
    """How near a time is to the least the memory allows: counted unique bytes / bandwidth / time.

    What is read cannot exceed 1 with a cold L2. What is written may: up to the L2's size of it can still be there when
    the call is over.
    """
    return round(bytes_moved / bytes_per_second / seconds, 4)


def kernel_milliseconds(call: Call, device: Any, repeats: int = 5) -> float | None:
    """Device time of one call with a cold L2: its kernels, copies and fills, by PyTorch's profiler.

    None where the profiler sees nothing (no permission to profile).
    """
    reading = _profiled(device.flush, 1)
    if not reading:
        return None

    def cold() -> None:
        device.flush()
        call()

    spent = _profiled(cold, repeats)
    microseconds = sum(time for name, time in spent.items() if name not in reading)
    return round(microseconds / 1e3 / repeats, 5) if microseconds else None


def _profiled(call: Call, repeats: int) -> dict[str, float]:
    """Name of what ran on the device -> microseconds."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    return {event.key: event.self_device_time_total for event in profile.key_averages() if event.self_device_time_total}


# ---------------------------------------------------------------------------------------------
# The device's state

STATE = {
    "clocks.sm": "sm_mhz", "clocks.mem": "memory_mhz", "clocks.max.sm": "most_sm_mhz", "power.draw": "watts",
    "power.limit": "watts_limit", "temperature.gpu": "celsius", "pstate": "pstate",
}  # fmt: skip
"""Field of nvidia-smi -> its name in a record."""


def device_state(run: Callable[..., Any] = subprocess.run) -> dict[str, float | str] | None:
    """Clocks, power, temperature and performance state now. They are read, never set. None without nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={','.join(STATE)}", "--format=csv,noheader,nounits", *_which()]
    try:
        answer = run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    lines = answer.strip().splitlines()
    values = [value.strip() for value in lines[0].split(",")] if lines else []
    if len(values) != len(STATE):
        return None
    return {name: _number(value) for name, value in zip(STATE.values(), values, strict=True)}


def _which() -> list[str]:
    """Select the current device by its UUID: CUDA and nvidia-smi may number devices differently."""
    try:
        return [f"--id=GPU-{torch.cuda.get_device_properties().uuid}"] if torch.cuda.is_available() else []
    except (AttributeError, RuntimeError):
        return []


def _number(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value
