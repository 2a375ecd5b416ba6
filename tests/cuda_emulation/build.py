"""Compiles an emulated kernel (tests/cuda_emulation/*.cpp) and opens it."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


class Order(NamedTuple):
    """In which order the emulator runs threads and blocks; 0: ascending, 1: descending, else a seed to shuffle by."""

    threads: int = 0
    blocks: int = 0
    resident: int = 1  # blocks that take turns; with 1, each ends before the next begins
    ahead: int = 0  # 1: a warp goes on until it waits for the block, before the next warp does

    def __str__(self) -> str:
        ways = [("forwards", "backwards")[way] if way < 2 else "shuffled" for way in (self.threads, self.blocks)]
        return f"{ways[0]} {ways[1]}" + (" interleaved" if self.resident > 1 else "") + (" ahead" if self.ahead else "")


IN_ORDER = Order()
ORDERS = (IN_ORDER, Order(1, 1, ahead=1), Order(7, 3), Order(3, 7, resident=3))
every_order = pytest.mark.parametrize("order", ORDERS, ids=str)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="cuda_emulation-")  # removed when Python ends


@functools.cache
def open_emulated(source: str) -> Emulated:
    """The compiled `tests/cuda_emulation/<source>`, or a path elsewhere.

    Needs GCC, as the build itself does on Linux; skips the test where there is none.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("the emulated CUDA kernels are compiled by g++, and there is none")
    import torch  # its headers define float16 and bfloat16

    path = HERE / source
    library = Path(_folder().name) / f"{path.stem}.so"
    include = [f"-I{HERE}", f"-I{ROOT / 'csrc'}", "-isystem", f"{Path(torch.__file__).parent / 'include'}"]
    # Else libraries would share the shared memory of kernels of the same name, which lies in the first one's segment.
    # A libstdc++ that the compiler links into what it builds stays inside: torch has its own, and other locales.
    shared = ["-fPIC", "-shared", "-fno-gnu-unique", "-Wl,--exclude-libs,ALL"]
    checks = ["-fsanitize=alignment"]  # threads.h has what it calls: no library is needed
    # Threads jump from stack to stack. The checked longjmp, which some distributions' GCC takes by itself, aborts then.
    jumps = ["-U_FORTIFY_SOURCE"]
    flags = ["-std=c++20", "-O1", *shared, *checks, *jumps, "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas"]
    subprocess.run([compiler, *flags, *include, str(path), "-o", str(library)], check=True)
    return Emulated(ctypes.CDLL(str(library)))


class Emulated:
    """A library of functions `extern "C" const char* f(...)`, which return what went wrong, or null."""

    def __init__(self, library: ctypes.CDLL):
        self._library = library

    def call(self, name: str, *arguments, order: Order = IN_ORDER) -> None:
        """Runs function `name` with threads and blocks in the given order (emulation.h).

        Tensors become pointers, ints int64_t, floats double.

        Raises:
            RuntimeError: what the emulator found.
        """
        function = getattr(self._library, name)
        function.restype = ctypes.c_char_p
        self._library.emulation_set_order(*order)
        message = function(*map(_as_c, arguments))
        if message is not None:
            raise RuntimeError(message.decode())


def _as_c(argument):
    if isinstance(argument, float):
        return ctypes.c_double(argument)
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    return None if argument is None else ctypes.c_void_p(argument.data_ptr())
