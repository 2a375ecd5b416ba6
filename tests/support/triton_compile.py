"""Compiles Triton kernels for GPUs that are not there, and reads what the compiler made of them.

The test process may have Triton's interpreter switched on, which cannot compile: a process of its own does the work.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ARCHS = (80, 90, 100)


class Case(NamedTuple):
    """One specialisation of a kernel, as its launcher would make it."""

    module: str
    kernel: str
    signature: dict[str, str]
    """Argument -> type: "*bf16", "*i64", "i32", "fp32"; pointers are taken to be multiples of 16 bytes."""
    constants: dict[str, Any]
    """Constexpr arguments, and others that are None."""
    num_warps: int
    num_stages: int
    multiples: tuple[str, ...] = ()
    """Integer arguments that are multiples of 16, which a launch tells the compiler of."""
    maxnreg: int | None = None
    """Registers a thread may use at most, where the launch says so."""


class Compiled(NamedTuple):
    """A case for one architecture; bytes a thread, but `shared` a block."""

    case: Case
    arch: int
    registers: int
    stack: int
    local: int
    shared: int
    wgmma: bool


def compile_cases(cases: list[Case], archs: tuple[int, ...] = ARCHS) -> list[Compiled]:
    """Every case for every architecture.  Fails, with the compiler's words, where one does not compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"  # as Triton decides by itself today, but then with a warning
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")])
    request = json.dumps({"cases": cases, "archs": archs})
    done = subprocess.run([sys.executable, __file__], input=request, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return [Compiled(Case(*case), *rest) for case, *rest in json.loads(done.stdout.splitlines()[-1])]


def _compile(case: Case, arch: int) -> Compiled:
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(case.module), case.kernel)
    names = function.arg_names
    assert set(case.signature) | set(case.constants) == set(names), (case.kernel, names)
    signature = {name: "constexpr" if name in case.constants else case.signature[name] for name in names}
    aligned = [index for index, name in enumerate(names) if signature[name].startswith("*") or name in case.multiples]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs=dict(case.constants),
        attrs={(index,): [["tt.divisibility", 16]] for index in aligned},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "maxnreg": case.maxnreg}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    used = _resources(compiled.asm["cubin"])

    shared = max(used["SHARED"], compiled.metadata.shared)
    return Compiled(case, arch, used["REG"], used["STACK"], used["LOCAL"], shared, "wgmma" in compiled.asm["ptx"])


def _resources(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    print(json.dumps([_compile(Case(*case), arch) for case in asked["cases"] for arch in asked["archs"]]))
