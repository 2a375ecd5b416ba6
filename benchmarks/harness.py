"""What every benchmark shares: timing side by side, peak memory, and the record.

Providers are timed in turns (a, b, c, a, b, c, ...), so that a busy machine slows all of them
alike. The record has the median and two quantiles of each, never its best run.

On a GPU, `gpu_timing` takes the samples; the record also has the kernels' own time.
"""

from __future__ import annotations

import ctypes
import gc
import json
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


# ---------------------------------------------------------------------------------------------
# Measuring


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats


def time_side_by_side(
    providers: dict[str, Callable[[], Any]],
    *,
    budget: float = 10.0,
    min_rounds: int = 5,
    max_rounds: int = 200,
    sample: Callable[[Callable[[], Any]], float] | None = None,
    warm: bool = False,
) -> dict[str, dict[str, float]]:
    """Median, 0.2 and 0.8 quantile and least in milliseconds of one call of each provider.

    Rounds go on until `budget` seconds are spent (but at least `min_rounds`).  `sample`: the seconds of one call, as
    `gpu_timing` takes them; None: on the CPU, a sample is the mean of as many calls as fill two milliseconds.  `warm`:
    each has run before, so that a first call of more than a second counts too.
    """
    repeats = {}
    samples: dict[str, list[float]] = {name: [] for name in providers}
    for name, call in providers.items():
        once = _seconds(call, 1)  # warms up: lazy initialisation, caches
        if once < 1:
            once = _seconds(call, 1)
        elif warm:
            samples[name].append(once * 1e3)
        repeats[name] = max(1, min(1000, int(2e-3 / max(once, 1e-9))))
    started = time.perf_counter()
    for round_index in range(max_rounds):
        if round_index >= min_rounds and time.perf_counter() - started > budget:
            break
        for name, call in providers.items():
            samples[name].append((sample(call) if sample else _seconds(call, repeats[name])) * 1e3)
    return {name: _summary(values) for name, values in samples.items()}


def _summary(values: list[float]) -> dict[str, float]:
    fifths = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values
    hundredths = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else values
    return {
        "median_ms": round(statistics.median(values), 5),
        "q20_ms": round(fifths[0], 5),
        "q80_ms": round(fifths[-1], 5),
        "p99_ms": round(hundredths[-1], 5),
        "least_ms": round(min(values), 5),
        "samples": len(values),
    }


def peak_memory_mib(call: Callable[[], Any], device: str = "cpu") -> float | None:
    """Memory that one call needs beyond its inputs, with its result; None where unknown. `call` has run before.

    On the CPU this is the process's resident high-water mark (Linux; good to about 0.5 MiB),
    measured after free heap pages went back to the system, so that they are not reused unseen.
    """
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 2)
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    except (OSError, AttributeError):
        return None
    before = _status_kib("VmRSS")
    result = call()
    peak = _status_kib("VmHWM")
    del result
    return round(max(0, peak - before) / 1024, 2)


def _status_kib(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match, f"no {field} in /proc/self/status"
    return int(match.group(1))


# ---------------------------------------------------------------------------------------------
# Recording


def environment(device: str = "cpu") -> dict[str, Any]:
    """Machine and versions of a measurement."""
    record: dict[str, Any] = {
        "processor": torch.cuda.get_device_name() if device != "cpu" else _cpu_name(),
        **({"instructions": instruction_sets()} if device == "cpu" else {}),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": _version("torchvision"),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }
    if device != "cpu":
        record["cuda"] = torch.version.cuda
    return record


def _cpu_info() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _cpu_name() -> str:
    match = re.search(r"model name\s*:\s*(.+)", _cpu_info())
    return match.group(1).strip() if match else platform.processor() or platform.machine()


INSTRUCTIONS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX512-BF16",
    "avx512_vnni": "AVX512-VNNI",
    "avx_vnni": "AVX-VNNI",
    "amx_bf16": "AMX-BF16",
    "amx_int8": "AMX-INT8",
    "bf16": "Arm BF16",
}
"""Flag of a processor under Linux -> its usual name: what decides over the speed of each precision."""
BF16 = ("AVX512-BF16", "AMX-BF16", "Arm BF16")
INT8 = ("AVX512-VNNI", "AVX-VNNI", "AMX-INT8")


def instruction_sets() -> list[str]:
    """Those of `INSTRUCTIONS` that this processor has; none where the system does not say."""
    match = re.search(r"^(?:flags|Features)\s*:(.+)", _cpu_info(), re.MULTILINE)
    flags = set(match.group(1).split()) if match else set()
    return [name for flag, name in INSTRUCTIONS.items() if flag in flags]


def lacks_bf16() -> str | None:
    """Why bfloat16 is not timed on this processor; None: it is."""
    if set(BF16) & set(instruction_sets()):
        return None
    return "this processor has neither AVX512-BF16 nor AMX: bf16 would be emulated"


def _version(module: str) -> str:
    try:
        return __import__(module).__version__
    except ImportError:
        return "missing"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_record(op: str, record: dict[str, Any], device: str = "cpu") -> Path:
    """Put one case's record into results/<device>/<op>.json, in place of an older one of that case."""
    folder = "cpu" if device == "cpu" else re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower()
    path = RESULTS / folder / f"{op}.json"
    cases = json.loads(path.read_text())["cases"] if path.exists() else []
    names = [case["case"] for case in cases]
    if record["case"] in names:
        cases[names.index(record["case"])] = record
    else:
        cases.append(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"op": op, "cases": cases}, indent=2) + "\n")
    return path
