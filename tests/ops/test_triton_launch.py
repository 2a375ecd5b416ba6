"""`_triton.Launcher` launches what Triton would launch, with the same arguments: with Triton itself, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from doublehead.ops._triton import Launcher, kind_of
from tests.support.paths import ROOT

DRIVER = """
import json, sys, torch, triton, triton.compiler
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

PASSED = []

class Utils:
    def load_binary(self, *_): return "module", "function", 32, 0, 1024
    def unload_module(self, _): pass
    def get_device_properties(self, _): return {"max_shared_mem": 232448, "multiprocessor_count": 132}

class Launch:
    def __init__(self, *_): pass
    def __call__(self, *given):
        flat = [part for g in given for part in (g if isinstance(g, (tuple, list)) else [g])]
        PASSED.append([self.name(part) for part in flat])
    def name(self, value):
        if isinstance(value, torch.Tensor): return value.data_ptr()
        return value if isinstance(value, (int, float, str)) else type(value).__name__

class Driver:  # of a GPU that is not there
    utils, launcher_cls = Utils(), Launch
    def get_current_device(self): return 0
    def get_current_stream(self, _): return 7
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

getattr(driver, "driver", driver).set_active(Driver())
from doublehead.ops import _triton
from doublehead.ops.batch_norm import kernel
from doublehead.ops.batch_norm.arguments import ApplyArguments, BackwardArguments, ForwardArguments
from doublehead.ops.non_local import Attention, kernel as attention
"""

TWICE = """
x, c = torch.zeros(40, 64, dtype=torch.bfloat16), torch.zeros(64)
grid, given = (3, 1, 1), (x, None, c, c, c, c, x, 40, 64)
for _ in range(2):
    kernel._apply[False, True](kernel._kind(x, c), grid, *given)
kernel.apply_kernel[grid](*given, **kernel._apply[False, True].constants)
print(json.dumps(PASSED))
"""

ALIKE = """
class Made:  # in place of a compiled kernel
    function = packed_metadata = None
    def launch_metadata(self, *_): pass
    def run(self, *_): pass
    def __getitem__(self, grid): return self.run

triton.compiler.compile = lambda *_, **__: Made()
made = set()

def checked(self, kind, grid, *arguments):
    kernel = self.kernel[grid](*arguments, **self.constants)  # what Triton chooses, by looking at every argument
    made.add(kernel)
    if kind is not None:
        assert self._compiled.setdefault(kind, kernel) is kernel, (self.kernel.__name__, kind)

_triton.Launcher.__call__ = checked
for dtype in (torch.bfloat16, torch.float32):
    for rows in (1, 16, 40, 5000):
        for channels in (1, 8, 16, 64, 128):
            for offset in (0, 1):  # elements: the second begins at an odd address
                for weights in (torch.float32, torch.float64):
                    x, y, residual = (torch.zeros(rows * channels + 1, dtype=dtype)[offset:][: rows * channels]
                                      .view(rows, channels) for _ in range(3))
                    w = torch.ones(channels, dtype=weights)
                    for extra in (None, residual):
                        _, mean, invstd = kernel.batch_norm_act(ForwardArguments(x, w, w, extra, True, 1e-5))
                        kernel.batch_norm_act_apply(ApplyArguments(x, mean, invstd, w, w, extra, False))
                        for wanted in (False, True):
                            kernel.batch_norm_act_backward(
                                BackwardArguments(x, x, None if extra is None else y, mean, invstd, w, 1e-5, wanted))
sizes = (3, 49, 1, 16), (16, 16, 2, 32), (1, 1, 1, 32), (1, 49, 16, 16), (2, 100, 1, 16)
for dtype in (torch.bfloat16, torch.float32):
    for number, cells, groups, width in sizes:
        qkv = torch.zeros(number, cells, 3 * groups * width, dtype=dtype)
        out = attention.non_local_attention(qkv, Attention(groups, True, 0.5))
        attention.non_local_attention(qkv, Attention(groups, False, 0.5), torch.tensor(1))
        attention.non_local_attention_backward(out, qkv, Attention(groups, True, 0.5))
print(json.dumps(len(made)))
"""


def run(script: str):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run([sys.executable, "-c", DRIVER + script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_later_launch_passes_what_triton_passes():
    pytest.importorskip("triton")
    first, again, by_triton = run(TWICE)
    assert first == again == by_triton
    assert first[:4] == [3, 1, 1, 7] and len(first) > 15


def test_launches_of_one_kind_are_one_kernel_to_triton():
    pytest.importorskip("triton")
    assert run(ALIKE) > 60  # calls that Triton tells apart


class Kernel:
    """Stands in for a `triton.jit` function; `made` is what a launch returns."""

    def __init__(self, made=None) -> None:
        self.arg_names, self.made, self.launched = ["x", "rows", "RELU", "ROWS"], made, []

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.launched.append((grid, arguments, constants)) or self.made


def test_what_was_compiled_is_launched_for_its_kind_alone():
    compiled, x = Kernel(), torch.zeros(4)
    kernel = Kernel(compiled)
    launch = Launcher(kernel, RELU=True, ROWS=16, num_warps=4)
    for kind in (("a",), ("a",), ("b",), None, None):
        launch(kind, (2, 1, 1), x, 4)
    assert [entry[1:] for entry in kernel.launched] == [((x, 4), {"RELU": True, "ROWS": 16, "num_warps": 4})] * 4
    assert compiled.launched == [((2, 1, 1), (x, 4, True, 16), {})]


def test_what_the_interpreter_runs_goes_the_ordinary_way():
    kernel, x = Kernel(), torch.zeros(4)
    launch = Launcher(kernel, RELU=True, ROWS=16)
    for _ in range(2):
        launch(("a",), (1, 1, 1), x, 4)
    assert len(kernel.launched) == 2


@pytest.mark.parametrize("constants", [{"ROWS": 16, "RELU": True}, {"RELU": True}])
def test_constants_are_the_last_arguments_in_order(constants):
    with pytest.raises(ValueError, match="constants must be the last of x, rows, RELU, ROWS, in this order"):
        Launcher(Kernel(), **constants)


def test_kinds(monkeypatch):
    x, half = torch.zeros(8), torch.zeros(8, dtype=torch.float16)
    assert kind_of(x, None) == kind_of(torch.ones(9), None) != kind_of(x, x)
    assert kind_of(x, half) != kind_of(half, x)
    assert kind_of(x, x[1:]) is None
    monkeypatch.setattr(torch.version, "hip", "6.4")  # there Triton looks at sizes too
    assert kind_of(x) is None
