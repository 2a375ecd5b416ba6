"""The compiled parts' error messages, which must come whole out of any compiler's build.

A compiler that links libstdc++ statically brings a second one into the process. A number printed through a stream then
meets the locales of the other, and the process dies in place of raising the error.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.paths import ROOT

TORCH = Path(torch.__file__).parent
STREAMS = re.compile(r"std::(locale|ios_base|basic_\w*stream|__cxx11::basic_\w*(stream|buf))\b")
LOCALES = re.compile(r"std::(locale|ios_base|num_put|codecvt)\b")  # of the library itself, not made from its templates


@pytest.fixture(scope="module")
def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++")
    if found is None:
        pytest.skip("needs g++")
    return found


def symbols(library: Path, *options: str) -> str:
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    return subprocess.run(["nm", "-C", *options, library], capture_output=True, text=True, check=True).stdout


def lines_with(pattern: re.Pattern, text: str) -> list[str]:
    return [line for line in text.splitlines() if pattern.search(line)]


def compile_library(compiler: str, folder: Path, source: str, *options: str) -> Path:
    """`folder/library.so`, and beside it the object that it was linked from."""
    (folder / "source.cpp").write_text(source)
    include = [f"-I{ROOT / 'csrc'}", "-isystem", f"{TORCH / 'include'}", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    compile_object = [compiler, "-std=c++20", "-O1", "-fPIC", *include, "-c", "source.cpp", "-o", "object.o"]
    subprocess.run(compile_object, check=True, cwd=folder)
    subprocess.run([compiler, "-shared", "object.o", "-o", "library.so", *options], check=True, cwd=folder)
    return folder / "library.so"


def test_no_source_uses_streams():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert len(sources) > 20
    include = re.compile(
        r"#include <(sstream|iostream|ostream|istream|iomanip|fstream|locale)>|std::(cout|cerr|clog)\b"
    )
    assert [path.name for path in sources if include.search(path.read_text())] == []


MESSAGES = """
#include "message.h"
#include <cstdint>
#include <cstring>

extern "C" void message(char* to) {
  const char* dtype = "Float";
  const std::string shape = "[2, 3]";
  try {
    doublehead::fail("a: ", dtype, ' ', shape, " ", int64_t(-1) << 62, " ", 7u, " ", true, " ", 0.5, " ", 1e-5f);
  } catch (const std::exception& error) {
    std::strcpy(to, error.what());
  }
}
"""


def test_messages_are_those_of_a_stream_without_one(compiler, tmp_path):
    library = compile_library(compiler, tmp_path, MESSAGES)
    assert lines_with(STREAMS, symbols(tmp_path / "object.o")) == []
    text = ctypes.create_string_buffer(200)
    ctypes.CDLL(str(library)).message(text)
    assert text.value.decode() == "a: Float [2, 3] -4611686018427387904 7 1 0.5 1e-05"


# torch's headers use streams themselves where one of its functions fails, out of memory for example.
FAILURE_OF_TORCH = """
#include "common.h"
#include <cstring>

extern "C" void message(char* to) {
  try {
    torch::headeronly::detail::throw_exception("empty", "file.h", 12345);
  } catch (const std::exception& error) {
    std::strcpy(to, error.what());
  }
}
"""
PRINT_MESSAGE = """
import ctypes, sys, torch
text = ctypes.create_string_buffer(200)
ctypes.CDLL(sys.argv[1]).message(text)
print(text.value.decode())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the link options are those of Linux")
def test_a_static_libstdcxx_stays_inside(compiler, tmp_path):
    options = re.findall(r'"LINKER:(\S+)"', (ROOT / "CMakeLists.txt").read_text())
    options = [f"-Wl,{option}" for option in options]
    found = subprocess.run([compiler, "-print-file-name=libstdc++.a"], capture_output=True, text=True).stdout.strip()
    if not Path(found).is_file():
        pytest.skip("there is no libstdc++.a")
    library = compile_library(
        compiler, tmp_path, FAILURE_OF_TORCH, str(TORCH / "lib" / "libtorch_cpu.so"), *options, "-static-libstdc++"
    )
    assert lines_with(LOCALES, symbols(library, "-D", "--defined-only")) == []
    done = subprocess.run([sys.executable, "-c", PRINT_MESSAGE, library], capture_output=True, text=True)
    assert done.stdout == "empty API call failed at file.h, line 12345\n", done.stderr


@pytest.mark.parametrize("part", ["_C", "_C_cuda"])
def test_the_built_part_shares_no_streams_and_no_cuda_runtime(part):
    built = sorted((ROOT / "doublehead").glob(f"{part}.*.so"))
    if not built:
        pytest.skip(f"{part} is not built")
    defined = symbols(built[0], "-D", "--defined-only")
    assert "PyInit_" in defined
    assert lines_with(LOCALES, defined) == []
    assert not re.search(r" (cuda[A-Z]\w+|__cudart\w+)$", defined, re.MULTILINE)
