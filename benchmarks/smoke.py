"""Each kernel once, in every dtype, against its reference in float64; a detector's steps; a graph: in 90 seconds.

python benchmarks/smoke.py                    on the GPU; without one it prints a note and checks nothing
python benchmarks/smoke.py --device cpu       at small sizes on the CPU, Triton's kernels in its interpreter
python benchmarks/smoke.py --only nms         these cases alone (--list lists all)

A row fails if a result is further off than twice plain PyTorch in the same dtype, or if it came from the reference
instead of the kernel.  Cases run in processes of their own, side by side: an illegal access ends one, not all.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
JOBS = min(12, os.cpu_count() or 1)


class Row(NamedTuple):
    """A line of the table."""

    kernel: str
    dtype: str
    error: float
    bound: float
    ok: bool
    note: str = ""


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 if every row passes, else 1."""
    options = parse(arguments)
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before a module with kernels is imported
    import torch

    sys.path.insert(0, str(HERE))
    import smoke_detector  # noqa: F401  (enters its cases)
    import smoke_networks  # noqa: F401
    from smoke_cases import CASES

    if options.list:
        print("\n".join(CASES))
        return 0
    unknown = set(options.only or ()) - set(CASES)
    if unknown:
        print(f"no case {', '.join(sorted(unknown))}; there are: {', '.join(CASES)}", file=sys.stderr)
        return 2
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: nothing checked")
        return 0
    chosen = {name: CASES[name] for name in options.only or CASES}
    if options.rows:
        rows = [row for name in chosen for row in rows_of(name, chosen[name], options.device, options.dtype)]
        Path(options.rows).write_text(json.dumps(rows))
        return 0
    rows = side_by_side(chosen, options) if options.jobs else in_this_process(chosen, options.device)
    forgotten = set() if options.only else forgotten_operators(chosen)
    rows += [Row(name, "", 0, 0, False, "no case runs this operator") for name in sorted(forgotten)]
    return report(rows)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", metavar="CASE")
    parser.add_argument("--list", action="store_true", help="name the cases")
    parser.add_argument("--jobs", type=int, default=JOBS, help="processes side by side; 0: all in this one")
    parser.add_argument("--seconds", type=float, default=85, help="what is not done by then is stopped, and named")
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    parser.add_argument("--rows", help=argparse.SUPPRESS)  # a file: the rows of a process for the one that started it
    return parser.parse_args(arguments)


def forgotten_operators(cases: dict) -> set[str]:
    """Operators of the library that no case names, though a GPU has a kernel for them."""
    from doublehead.ops._library import CPU_ONLY, SCHEMAS

    return set(SCHEMAS) - CPU_ONLY - {operator for case in cases.values() for operator in case.operators}


# ---------------------------------------------------------------------------------------------
# Rows


def rows_of(name: str, case, device: str, only_dtype: str | None = None) -> list[Row]:
    """One row for each dtype; an exception is a failure like others."""
    rows = []
    for dtype in case.dtypes:
        label = str(dtype).removeprefix("torch.")
        if only_dtype not in (None, label):
            continue
        if device == "cpu" and case.cuda:
            rows.append(Row(name, label, 0, 0, True, "skipped: needs CUDA"))
        elif device == "cpu" and case.launches and label == "bfloat16":
            rows.append(Row(name, label, 0, 0, True, "skipped: Triton's interpreter has no bfloat16 products"))
        else:
            rows.append(row_of(name, label, case, device, dtype))
    return rows


def row_of(name: str, label: str, case, device: str, dtype) -> Row:
    import torch

    from doublehead.ops._fallback import fallbacks
    from tests.support.interpreter import kernels_on_cpu

    inside = kernels_on_cpu() if device == "cpu" else torch.cuda.device(0)
    try:
        with warnings.catch_warnings(), inside, watched() as seen, fallbacks() as served:
            warnings.simplefilter("ignore", RuntimeWarning)  # of fallbacks: the table says so
            compared = list(case.run(device, dtype))
            if device == "cuda":
                torch.cuda.synchronize()
    except Exception as error:
        traceback.print_exc()
        return Row(name, label, float("nan"), 0, False, f"{type(error).__name__}: {str(error).strip()[:200]}")
    wrong = [what for what, error, bound in compared if not error <= bound]
    notes = [f"wrong: {', '.join(wrong)}"] if wrong else []
    notes += reference_instead(case, device, seen, served)
    _, error, bound = max(compared, key=lambda c: (not c[1] <= c[2], c[1] / c[2] if c[2] else c[1]))
    return Row(name, label, error, bound, not notes, "; ".join(notes))


class Seen(NamedTuple):
    """What ran, with success."""

    launched: set[str]
    """The folders of `doublehead.ops` whose Triton kernels were launched."""
    called: set[str]
    """The operators of `torch.ops.doublehead` that were called."""


def reference_instead(case, device: str, seen: Seen, served: list[tuple[str, str]]) -> list[str]:
    """Where no kernel was run: the reference against itself proves nothing."""
    from doublehead.ops._library import TRITON_KERNELS, native

    notes = [f"reference instead of {operator}: {why}" for operator, why in dict(served).items()]
    missing = [folder for folder in case.launches if folder not in seen.launched]
    if missing and not notes:
        notes.append(f"no Triton kernel of {', '.join(missing)} was launched")
    compiled = [operator for operator in case.operators if operator not in TRITON_KERNELS]
    lacking = [name for name in compiled if not native(name, device)]
    idle = [name for name in compiled if name not in seen.called and name not in lacking]
    return (
        notes
        + [f"reference instead of {name}: no kernel" for name in lacking]
        + [f"{name} was not called" for name in idle]
    )


class watched:  # noqa: N801  (used as a function)
    """What runs inside."""

    def __enter__(self) -> Seen:
        from torch._ops import OpOverload, OpOverloadPacket
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction

        from doublehead.ops._triton import Launcher

        seen = Seen(set(), set())
        kernels = (JITFunction, "run"), (InterpretedFunction, "run"), (Launcher, "__call__")
        operators = (OpOverload, "__call__"), (OpOverloadPacket, "__call__")
        notes = {**dict.fromkeys(kernels, seen_launch), **dict.fromkeys(operators, seen_call)}
        self._before = [(kind, name, getattr(kind, name)) for kind, name in notes]
        for (kind, name, run), note in zip(self._before, notes.values(), strict=True):
            setattr(kind, name, self._noting(run, note, seen))
        return seen

    @staticmethod
    def _noting(run, note, seen: Seen):
        def noting(function, /, *arguments, **options):
            result = run(function, *arguments, **options)
            note(function, seen)
            return result

        return noting

    def __exit__(self, *_) -> None:
        for kind, name, run in self._before:
            setattr(kind, name, run)


def seen_launch(kernel, seen: Seen) -> None:
    parts = (getattr(kernel, "kernel", None) or kernel).fn.__module__.split(".")
    if parts[:2] == ["doublehead", "ops"]:
        seen.launched.add(parts[2])


def seen_call(operator, seen: Seen) -> None:
    namespace, _, name = str(operator).partition(".")  # "doublehead.nms.default", or without the last
    if namespace == "doublehead":
        seen.called.add(name.split(".")[0])


def in_this_process(cases: dict, device: str) -> list[Row]:
    return [row for name, case in cases.items() for row in rows_of(name, case, device)]


# ---------------------------------------------------------------------------------------------
# Processes


class Task(NamedTuple):
    """Rows that one process makes."""

    kernel: str
    dtype: str | None


def side_by_side(cases: dict, options: argparse.Namespace) -> list[Row]:
    """Runs every case, or each of its dtypes, in a process of its own, a limited number at a time."""
    waiting = [task for name, case in cases.items() for task in tasks_of(name, case)]
    waiting.sort(key=lambda task: task.dtype is None)  # what takes long first
    running: dict[subprocess.Popen, tuple[Task, Path]] = {}
    rows: list[Row] = []
    end = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < options.jobs and time.monotonic() < end:
                task, file = waiting.pop(0), Path(folder, f"{len(waiting)}")
                running[start(task, file, options)] = task, file
            late = time.monotonic() >= end
            for process in [p for p in running if late or p.poll() is not None]:
                task, file = running.pop(process)
                rows += finished(process, task, file, options.seconds)
            if late:
                rows += [Row(*label(task), 0, 0, False, f"not begun within {options.seconds:g} s") for task in waiting]
                waiting.clear()
            time.sleep(0.05)
    order = list(cases)
    return sorted(rows, key=lambda row: order.index(row.kernel))


def tasks_of(name: str, case) -> list[Task]:
    if not case.apart:
        return [Task(name, None)]
    return [Task(name, str(dtype).removeprefix("torch.")) for dtype in case.dtypes]


def start(task: Task, file: Path, options: argparse.Namespace) -> subprocess.Popen:
    command = [sys.executable, __file__, "--device", options.device, "--only", task.kernel, "--rows", str(file)]
    command += ["--dtype", task.dtype] if task.dtype else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
    output = open(f"{file}.log", "w")
    return subprocess.Popen(
        command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )  # fmt: skip


def finished(process: subprocess.Popen, task: Task, file: Path, seconds: float) -> list[Row]:
    """The rows of a process, or one row that says why there are none.  A process that still runs is stopped."""
    status = process.poll()
    if status is None:
        os.killpg(process.pid, signal.SIGKILL)  # with the compilers it has started
        process.wait()
    log = Path(f"{file}.log").read_text(errors="replace").strip()
    if status == 0 and file.exists():
        rows = [Row(*row) for row in json.loads(file.read_text())]
    else:
        why = f"stopped after {seconds:g} s" if status is None else f"the process ended with status {status}"
        rows = [Row(*label(task), float("nan"), 0, False, why)]
    if not all(row.ok for row in rows) and log:
        print(f"-- {task.kernel} {task.dtype or ''}\n{log[-3000:]}")
    return rows


def label(task: Task) -> tuple[str, str]:
    return task.kernel, task.dtype or ""


# ---------------------------------------------------------------------------------------------
# The table


def report(rows: list[Row]) -> int:
    width = max(len(row.kernel) for row in rows)
    print(f"{'kernel':{width}}  {'dtype':8}  {'max error':>9}  {'bound':>9}  ok")
    for row in rows:
        ok = "skipped" if row.note.startswith("skipped") else "ok" if row.ok else "FAILED"
        line = f"{row.kernel:{width}}  {row.dtype:8}  {row.error:9.2e}  {row.bound:9.2e}  {ok}  {row.note}"
        print(line.rstrip())
    failed = [f"{row.kernel} {row.dtype}".strip() for row in rows if not row.ok]
    print(f"failed: {', '.join(failed)}" if failed else "all ok")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
