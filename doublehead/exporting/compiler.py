"""The C++ compiler of AOTInductor packages: whether there is one, and whether what it builds loads beside torch."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..errors import UserError

SOURCE = """
#include <stdexcept>
extern "C" void needs_the_standard_library() { throw std::runtime_error(""); }
"""
SHARED = b"libstdc++.so", b"libc++.so"
"""Names of the standard library, as a library lists them that needs them."""

HIDING = """#!/bin/sh
case " $* " in *" -shared "*) exec {compiler} "$@" -Wl,--exclude-libs,ALL ;; esac
exec {compiler} "$@"
"""
"""A compiler that hides the symbols of static libraries in the shared ones that it links."""


def check_compiler() -> None:
    """
    Raises:
        UserError: there is no C++ compiler.
    """
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++", "cl"]
    if not any(_found(name) for name in names):
        raise UserError(f"--format aoti compiles C++: no compiler is found ({', '.join(names)}); CXX names another one")


def inductor_settings(folder: Path) -> dict[str, Any]:
    """Settings of `torch._inductor.config` with which a package loads beside torch.

    Two versions of libstdc++ in a process must not share their locales: a package whose compiler has put one into it
    crashes when it is opened, or throws `std::bad_cast`.  It works where the package keeps its own to itself.

    Args:
        folder: for a script that must stay until the package is written.
    """
    from torch._inductor import config  # only now: programs are opened without it

    chosen = config.cpp.cxx
    compiler = _found(chosen if isinstance(chosen, str) else chosen[-1] or "")
    if not sys.platform.startswith("linux") or not compiler or not _links_its_own_library(compiler, folder):
        return {}
    script = folder / Path(compiler[0]).name  # by the name PyTorch tells the kind of compiler
    script.write_text(HIDING.format(compiler=shlex.join(compiler)))
    script.chmod(0o755)
    settings: dict[str, Any] = {"cpp.cxx": (None, str(script))}
    if hasattr(config.aot_inductor, "precompile_headers"):
        settings["aot_inductor.precompile_headers"] = False  # cached under the compiler's path, which is new each time
    return settings


def _found(compiler: str) -> list[str]:
    """Path and arguments of a compiler such as "ccache g++", which newer versions of PyTorch take; [] without one."""
    try:
        name, *arguments = [compiler] if sys.platform == "win32" else shlex.split(compiler) or [""]
    except ValueError:  # quotation marks that do not match
        return []
    path = shutil.which(name)
    return [path, *arguments] if path else []


def _links_its_own_library(compiler: list[str], folder: Path) -> bool:
    """Whether the C++ standard library goes into what the compiler builds."""
    source, library = folder / "needs.cpp", folder / "needs.so"
    source.write_text(SOURCE)
    command = [*compiler, "-shared", "-fPIC", str(source), "-o", str(library)]
    if subprocess.run(command, capture_output=True).returncode:
        return False  # PyTorch's message says more
    built = library.read_bytes()
    return not any(name in built for name in SHARED)
