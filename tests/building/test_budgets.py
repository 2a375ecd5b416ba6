"""What the hot kernels may take of a multiprocessor, and how many instructions stand on their critical paths.

`marked.cu` is compiled for each architecture with the marks of csrc/marks.h, and read by benchmarks/sass.py. A budget
is what the predictions in benchmarks/NOTES.md count on: a change that breaks one makes the kernel slower where no GPU
shows it.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.paths import BENCHMARKS

sys.path.insert(0, str(BENCHMARKS))

import machine_code  # noqa: E402
import sass  # noqa: E402

ARCHS = ["sm_80", "sm_90", "sm_100"]


class Budget(NamedTuple):
    """Of one kernel; its name mangled, as far as it takes to tell it from others."""

    kernel: str
    threads: int
    """Of a block."""
    blocks: int
    """Of a multiprocessor, at least."""
    dynamic: int = 0
    """Shared memory that the launch asks for, in bytes."""
    most: dict[str, int] = {}
    """Mark -> warp instructions on the longest way between its ends, at most."""
    loads: dict[str, str] = {}
    """Mark -> the only width of loads from global memory in it, "LDG.128"."""
    stores: str = ""
    """The only width of stores to global memory in the whole kernel."""


BUDGETS = [
    Budget(
        "pool_channels_lastIffLi4",
        threads=224,
        blocks=4,
        dynamic=928,
        most={"roi_align: forward column": 75},
        loads={"roi_align: forward column": "LDG.128"},
    ),
    Budget(
        "pool_channels_lastIN3c108BFloat16EfLi8",
        threads=224,
        blocks=4,
        dynamic=928,
        most={"roi_align: forward column": 160},
        loads={"roi_align: forward column": "LDG.128"},
    ),
    Budget(
        "gather_channels_lastIffLi4",
        threads=512,
        blocks=2,
        dynamic=43 << 10,
        # A warp fills in a box and a block has 16 of them: 19 instructions a box on its critical path.
        most={"roi_align: fill of a box": 300, "roi_align: copy of a bin": 55, "roi_align: column of bins": 110},
        loads={"roi_align: copy of a bin": "LDGSTS.128"},
        stores="STG.128",
    ),
    Budget(
        "gather_channels_lastIN3c108BFloat16EfLi8",
        threads=512,
        blocks=2,
        dynamic=43 << 10,
        most={"roi_align: fill of a box": 300, "roi_align: copy of a bin": 50, "roi_align: column of bins": 90},
        loads={"roi_align: copy of a bin": "LDGSTS.128"},
        stores="STG.128",
    ),
    Budget(
        "pool_planarIff",
        threads=128,
        blocks=5,
        dynamic=18 << 10,
        most={"roi_align: taps of a column": 250, "roi_align: planar output": 200},
    ),
    Budget(
        "decideIf",
        threads=1024,
        blocks=1,
        most={
            "nms: 32 tests": 640,
            "nms: 32 strikes": 640,
            "nms: 16 tests of a segment": 340,
            "nms: turn of a tile": 400,
        },
    ),
    Budget("rank_boxesIfff", threads=512, blocks=3, most={"nms: 8 comparisons": 270}),
    Budget("score_classesIN3c108BFloat16E", threads=256, blocks=6, most={"detections scores of a RoI": 570}),
    Budget(
        "suppress_classIff",
        threads=256,
        blocks=4,
        most={"detections 8 tests": 24 * 8, "detections pair of a sort": 18},
    ),
    Budget("merge_classesIff", threads=1024, blocks=1, most={"detections pair of a sort": 18}),
]


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="marked-")  # removed when Python ends


@functools.cache
def kernels(arch: str) -> list[sass.Kernel]:
    if sass.find_tool("cuobjdump") is None:
        pytest.skip("there is no cuobjdump, neither the CUDA toolkit's nor Triton's")
    if sass.find_nvcc() is None:
        pytest.skip("there is no nvcc to compile the kernels with")
    return sass.read_kernels(sass.compile_marked(arch, Path(_folder().name)), arch)


def kernel_of(budget: Budget, arch: str) -> sass.Kernel:
    (found,) = [kernel for kernel in kernels(arch) if budget.kernel in kernel.usage.name]
    return found


every_kernel = pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: budget.kernel)


@pytest.mark.parametrize("arch", ARCHS)
@every_kernel
def test_so_many_blocks_fit_and_nothing_spills(budget, arch):
    usage = kernel_of(budget, arch).usage
    assert usage.local == usage.stack == 0
    assert sass.blocks_per_multiprocessor(usage, budget.threads, budget.dynamic) >= budget.blocks, usage


@pytest.mark.parametrize("arch", ARCHS)
@every_kernel
def test_critical_paths_are_as_short_as_predicted(budget, arch):
    sections = kernel_of(budget, arch).sections
    for mark, most in budget.most.items():
        longest = [section.longest for section in sections if section.mark == mark]
        assert longest, f"no mark {mark!r} is left"
        assert max(longest) <= most, (mark, longest)


@pytest.mark.parametrize("arch", ARCHS)
@every_kernel
def test_hot_loops_load_wide(budget, arch):
    for section in kernel_of(budget, arch).sections:
        if width := budget.loads.get(section.mark):
            loads = {kind for kind in section.opcodes if kind.split(".")[0] in ("LDG", "LD", "LDGSTS")}
            assert loads == {width}, (section.mark, section.opcodes)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("budget", [budget for budget in BUDGETS if budget.stores], ids=lambda budget: budget.kernel)
def test_results_are_stored_wide(budget, arch):
    counts = machine_code.count_opcodes(kernel_of(budget, arch).code.instructions)
    assert {kind for kind in counts if kind.startswith("STG")} == {budget.stores}


@pytest.mark.parametrize("arch", ARCHS)
def test_every_mark_is_in_the_code_and_in_a_budget(arch):
    """A mark nobody reads, or that the compiler lost."""
    found = {section.mark for kernel in kernels(arch) for section in kernel.sections if section.all}
    assert found == set(machine_code.marks_in())
    assert set(machine_code.marks_in()) <= {mark for budget in BUDGETS for mark in budget.most}
