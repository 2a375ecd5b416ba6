"""What the compiler made of the CUDA kernels: machine code for every architecture, nothing in local memory."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.paths import ROOT

ARCHS = ["sm_80", "sm_90", "sm_100"]
MOST_REGISTERS = 128  # four warps of a scheduler still fit: 4 schedulers x 4 warps x 32 lanes x 128 = 64 Ki registers
MOST_REGISTERS_OF_DOUBLE = 192  # float64 is for checking gradients: it need not be fast
MOST_SHARED = 48 * 1024  # what a kernel gets without asking for more


class Kernel(NamedTuple):
    """One kernel in one architecture's machine code; bytes a thread, but `shared` a block."""

    arch: str
    name: str
    registers: int
    stack: int
    local: int
    shared: int

    @property
    def most_registers(self) -> int:
        return MOST_REGISTERS_OF_DOUBLE if "Id" in self.name else MOST_REGISTERS  # mangled: kernel<double, ...>


def cuobjdump() -> str | None:
    """The toolkit's, or the one that comes with Triton."""
    found = shutil.which("cuobjdump")
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        inside = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(inside) if inside.is_file() else None
    return found


def read_usage(text: str) -> list[Kernel]:
    """The kernels in the output of `cuobjdump -res-usage`."""
    kernels, arch, name = [], "", ""
    for line in text.splitlines():
        if match := re.match(r"arch = (sm_\w+)", line.strip()):
            arch = match[1]
        elif match := re.match(r"Function (\S+):", line.strip()):
            name = match[1]
        elif "REG:" in line and name:
            used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", line)}
            kernels.append(Kernel(arch, name, used["REG"], used["STACK"], used["LOCAL"], used["SHARED"]))
            name = ""
    return kernels


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    """This library's kernels (CUB's are not ours), from the built module."""
    built = sorted((ROOT / "doublehead").glob("_C_cuda*.so"))
    if not built:
        pytest.skip("the CUDA part was not built here (no nvcc, or a torch without CUDA), so there is nothing to read")
    tool = cuobjdump()
    if tool is None:
        pytest.skip("there is no cuobjdump, neither the CUDA toolkit's nor Triton's")
    output = subprocess.run([tool, "-res-usage", str(built[0])], capture_output=True, text=True, check=True).stdout
    return [kernel for kernel in read_usage(output) if "doublehead" in kernel.name]


def rooms() -> list[str]:
    return sorted(path.parent.parent.name for path in (ROOT / "csrc").glob("*/cuda/*.cu"))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("room", rooms())
def test_every_room_has_kernels_for_every_architecture(kernels, room, arch):
    assert [kernel for kernel in kernels if kernel.arch.rstrip("af") == arch and room in kernel.name]


def test_nothing_spills_or_lies_in_local_memory(kernels):
    assert [kernel for kernel in kernels if kernel.stack or kernel.local] == []


def test_registers_and_shared_memory_stay_in_bounds(kernels):
    assert [kernel for kernel in kernels if kernel.registers > kernel.most_registers] == []
    assert [kernel for kernel in kernels if kernel.shared > MOST_SHARED] == []


def test_four_blocks_that_pool_seven_rows_fit_on_a_multiprocessor(kernels):
    pooling = [kernel for kernel in kernels if "pool_channels_last" in kernel.name and "Id" not in kernel.name]
    assert pooling
    for kernel in pooling:
        registers = (kernel.registers + 7) // 8 * 8  # as they are given out
        assert 4 * 7 * 32 * registers <= 64 * 1024, kernel


def test_the_report_is_read_right():
    text = """
Fatbin elf code:
================
arch = sm_90
Resource usage:
 Common:
  GLOBAL:0 CONSTANT[3]:8
 Function _ZN10doublehead3nms4markEv:
  REG:38 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:560 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    assert read_usage(text) == [Kernel("sm_90", "_ZN10doublehead3nms4markEv", 38, 8, 0, 1024)]
