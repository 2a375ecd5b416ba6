"""No Triton kernel is compiled anew because a batch has another number of rows: seconds, in the middle of serving."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

COUNTS = {"rows", "part_rows", "parts", "number", "batch", "maps", "images", "boxes", "rois", "total", "proposals"}
"""Arguments that count what a batch holds.  Widths and strides are specialised: loads of 16 bytes depend on it."""

LIST = """
import importlib, json, pkgutil
import doublehead.ops as ops
from triton.runtime.jit import JITFunction

found = {}
for room in pkgutil.iter_modules(ops.__path__):
    try:
        module = importlib.import_module(f"doublehead.ops.{room.name}.kernel")
    except ModuleNotFoundError:
        continue
    for name, value in vars(module).items():
        if isinstance(value, JITFunction) and value.__module__ == module.__name__ and name.endswith("kernel"):
            found[f"{room.name}.{name}"] = {p.name: bool(p.do_not_specialize) for p in value.params}
print(json.dumps(found))
"""


def kernels() -> dict[str, dict[str, bool]]:
    """Kernel -> argument -> whether it is left unspecialised.  In a process without Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, "-c", LIST], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_counts_are_not_specialised():
    pytest.importorskip("triton")
    found = kernels()
    assert {"fused_conv.fused_conv_kernel", "batch_norm.statistics_kernel"} <= found.keys()
    wrong = [
        f"{kernel}: {name}"
        for kernel, arguments in found.items()
        for name, unspecialised in arguments.items()
        if name in COUNTS and not unspecialised
    ]
    assert not wrong


def test_widths_are_specialised():
    pytest.importorskip("triton")
    found = kernels()
    for kernel in ("fused_conv.fused_conv_kernel", "batch_norm.apply_kernel"):
        for name in ("channels", "second_channels", "out_channels"):
            assert not found[kernel].get(name, False), (kernel, name)
