"""What the compiler made of the CUDA kernels: machine code for every architecture, nothing in local memory."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.paths import BENCHMARKS, ROOT

sys.path.insert(0, str(BENCHMARKS))

import sass  # noqa: E402

ARCHS = ["sm_80", "sm_90", "sm_100"]
MOST_REGISTERS = 128  # four warps of a scheduler still fit: 4 schedulers x 4 warps x 32 lanes x 128 = 64 Ki registers
MOST_REGISTERS_OF_DOUBLE = 192  # float64 is for checking gradients: it need not be fast
MOST_SHARED = 48 * 1024  # what a kernel gets without asking for more


def most_registers(kernel: sass.Usage) -> int:
    return MOST_REGISTERS_OF_DOUBLE if "Id" in kernel.name else MOST_REGISTERS  # mangled: kernel<double, ...>


@pytest.fixture(scope="module")
def kernels() -> list[sass.Usage]:
    """This library's kernels (CUB's are not ours), from the built module."""
    built = sass.built_module()
    if built is None:
        pytest.skip("the CUDA part was not built here (no nvcc, or a torch without CUDA), so there is nothing to read")
    tool = sass.find_tool("cuobjdump")
    if tool is None:
        pytest.skip("there is no cuobjdump, neither the CUDA toolkit's nor Triton's")
    output = subprocess.run([tool, "-res-usage", str(built)], capture_output=True, text=True, check=True).stdout
    return [kernel for kernel in sass.read_usage(output) if "doublehead" in kernel.name]


def rooms() -> list[str]:
    return sorted(path.parent.parent.name for path in (ROOT / "csrc").glob("*/cuda/*.cu"))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("room", rooms())
def test_every_room_has_kernels_for_every_architecture(kernels, room, arch):
    assert [kernel for kernel in kernels if kernel.arch.rstrip("af") == arch and room in kernel.name]


def test_nothing_spills_or_lies_in_local_memory(kernels):
    assert [kernel for kernel in kernels if kernel.stack or kernel.local] == []


def test_registers_and_shared_memory_stay_in_bounds(kernels):
    assert [kernel for kernel in kernels if kernel.registers > most_registers(kernel)] == []
    assert [kernel for kernel in kernels if kernel.shared > MOST_SHARED] == []


def test_four_blocks_that_pool_seven_rows_fit_on_a_multiprocessor(kernels):
    pooling = [kernel for kernel in kernels if "pool_channels_last" in kernel.name and "Id" not in kernel.name]
    assert pooling
    for kernel in pooling:
        registers = (kernel.registers + 7) // 8 * 8  # as they are given out
        assert 4 * 7 * 32 * registers <= 64 * 1024, kernel
