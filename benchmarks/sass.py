"""What the compiler made of the CUDA kernels: registers, shared memory, blocks a multiprocessor, widths of loads, and
the instructions between two marks (csrc/marks.h).

    python benchmarks/sass.py                                    # our kernels in the built module, for sm_90
    python benchmarks/sass.py --kernel pool_planar --arch sm_80  # those with this in their names
    python benchmarks/sass.py --marked                           # tests/building/marked.cu, compiled with the marks
    python benchmarks/sass.py some.cubin --threads 512

Needs cuobjdump, the CUDA toolkit's or that which comes with Triton, and --marked nvcc.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from machine_code import MEMORY, ROOT, Code, Section, Usage, count_opcodes, marks_in, read_code, read_usage, sections

MARKED = ROOT / "tests" / "building" / "marked.cu"


def find_tool(name: str) -> str | None:
    """The toolkit's program, or the one that comes with Triton; None if there is neither."""
    found = shutil.which(name)
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        inside = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        found = str(inside) if inside.is_file() else None
    return found


@functools.cache
def plain_name(mangled: str) -> str:
    """`pool_channels_last<float, float, 4>` of a mangled name, if c++filt is there."""
    tool = shutil.which("c++filt")
    if tool is None:
        return mangled
    text = subprocess.run([tool, mangled], capture_output=True, text=True, check=True).stdout.strip()
    text = re.sub(r"^void ", "", text)
    depth = 0
    for at, letter in enumerate(text):  # up to the parameters
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            text = text[:at]
            break
    return re.sub(r"doublehead::(\w+::)*(?=\w+(<|$))", "", text)


# ---------------------------------------------------------------------------------------------
# How many blocks fit


class Multiprocessor(NamedTuple):
    """NVIDIA's CUDA C++ Programming Guide, "Technical specifications per compute capability"."""

    threads: int
    blocks: int
    shared: int
    counted: bool
    """Whether cuobjdump's number of a kernel with shared memory holds the 1 KiB that the system takes of each block."""


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(2048, 32, 164 << 10, False),
    "sm_90": Multiprocessor(2048, 32, 228 << 10, True),
    "sm_100": Multiprocessor(2048, 32, 228 << 10, True),
}
REGISTERS = 64 << 10
SYSTEM_SHARED = 1 << 10


def blocks_per_multiprocessor(usage: Usage, threads: int, dynamic_shared: int = 0) -> int:
    """As the occupancy calculator has it: registers are given out to warps by 256, each scheduler has a quarter."""
    at = MULTIPROCESSORS[usage.arch.rstrip("af")]
    warps = -(-threads // 32)
    of_warp = -(-max(usage.registers, 1) * 32 // 256) * 256
    by_registers = REGISTERS // 4 // of_warp * 4 // warps
    shared = max(usage.shared, SYSTEM_SHARED) if at.counted else usage.shared + SYSTEM_SHARED
    of_block = -(-(shared + dynamic_shared) // 128) * 128
    return min(at.threads // (warps * 32), at.blocks, by_registers, at.shared // of_block)


# ---------------------------------------------------------------------------------------------
# All of a file


class Kernel(NamedTuple):
    usage: Usage
    code: Code
    sections: list[Section]


def built_module() -> Path | None:
    """The CUDA part as it was built in place."""
    return next(iter(sorted((ROOT / "doublehead").glob("_C_cuda*.so"))), None)


def read_kernels(path: Path, arch: str, names: list[str] | None = None) -> list[Kernel]:
    """The kernels of a module or a .cubin for one architecture ("sm_90").

    Raises:
        RuntimeError: there is no cuobjdump, or it cannot read the file.
    """
    tool = find_tool("cuobjdump")
    if tool is None:
        raise RuntimeError("there is no cuobjdump, neither the CUDA toolkit's nor Triton's")

    def output(*options: str) -> str:
        done = subprocess.run([tool, *options, str(path)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"cuobjdump cannot read {path}: {done.stderr.strip()}")
        return done.stdout

    only = [] if path.suffix == ".cubin" else ["-arch", arch]
    usages = {usage.name: usage for usage in read_usage(output("-res-usage", *only))}
    names = marks_in() if names is None else names
    return [
        Kernel(usages[code.name]._replace(arch=code.arch), code, sections(code, names))
        for code in read_code(output("-sass", *only))
    ]


def find_nvcc() -> str | None:
    """As setup.py looks for it."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places = [os.path.join(home, "bin") for home in homes if home] + [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(places))


def compile_marked(arch: str, folder: Path) -> Path:
    """`MARKED` for one architecture, with its marks and the build's options (CMakeLists.txt): a .cubin in `folder`.

    Raises:
        RuntimeError: there is no nvcc or no torch, or nvcc fails, with its words.
    """
    nvcc, torch = find_nvcc(), importlib.util.find_spec("torch")
    if nvcc is None or torch is None or torch.origin is None:
        raise RuntimeError("there is no nvcc, or no torch")
    cubin = folder / f"marked-{arch}.cubin"
    options = ["-O3", "-std=c++20", "-fmad=false", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA"]
    include = [f"-I{ROOT / 'csrc'}", "-isystem", str(Path(torch.origin).parent / "include")]
    command = [nvcc, "-cubin", f"-arch={arch}", "-DDOUBLEHEAD_MARKS", *options, *include, str(MARKED), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc fails: {done.stderr.strip()[-2000:]}")
    return cubin


def line(kernel: Kernel, threads: int) -> str:
    usage, counts = kernel.usage, count_opcodes(kernel.code.instructions)
    memory = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()) if kind.split(".")[0] in MEMORY)
    fit = blocks_per_multiprocessor(usage, threads)
    return (
        f"| {plain_name(usage.name)} | {usage.registers} | {usage.shared} | {usage.local + usage.stack} | {fit} "
        f"| {len(kernel.code.instructions)} | {memory} |"
    )


def marked(copies: list[Section]) -> str:
    """One mark's sections, as the compiler copied it: the shortest way, and the longest with what its copy has."""
    longest = max(copies, key=lambda section: section.longest)
    ways = f"{min(section.shortest for section in copies)} to {longest.longest} instructions"
    mix = ", ".join(f"{count} {kind}" for kind, count in Counter(longest.opcodes).most_common(8))
    return f"{longest.mark}: {ways}, {len(copies)} copies of {longest.all}: {mix}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, help="a module or a .cubin; without it the built module")
    parser.add_argument("--marked", action="store_true", help=f"compile {MARKED.relative_to(ROOT)} and read that")
    parser.add_argument("--kernel", default="doublehead", help="a part of the names to show, mangled or plain")
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--threads", type=int, default=256, help="of a block, for the blocks a multiprocessor")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = compile_marked(asked.arch, Path(folder)) if asked.marked else asked.file or built_module()
        if path is None:
            raise SystemExit("sass.py: the CUDA part was not built here; name a file.")
        try:
            kernels = read_kernels(path, asked.arch)
        except RuntimeError as error:
            raise SystemExit(f"sass.py: {error}") from None
    kernels = [k for k in kernels if asked.kernel in k.usage.name or asked.kernel in plain_name(k.usage.name)]
    if not kernels:
        raise SystemExit(f"sass.py: {path} has no kernel for {asked.arch} with {asked.kernel!r} in its name.")
    print(f"| kernel ({asked.arch}) | registers | shared | local | blocks of {asked.threads} | instructions | memory |")
    print("|---|---|---|---|---|---|---|")
    for kernel in kernels:
        print(line(kernel, asked.threads))
        for mark in dict.fromkeys(section.mark for section in kernel.sections):
            print(f"| - {marked([section for section in kernel.sections if section.mark == mark])} | | | | | | |")


if __name__ == "__main__":
    main()
