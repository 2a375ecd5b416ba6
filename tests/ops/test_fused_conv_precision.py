"""float32 on a GPU follows PyTorch's switches: which variant is launched, or which function of PyTorch is called."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from doublehead.ops.fused_conv import gradient, reference
from doublehead.ops.fused_conv.arguments import FusedConvArguments
from tests.support.paths import ROOT

# What the user sets -> the precision of what replaces convolutions, and of what replaces matrix products.
SWITCHES = {
    "": ("tf32", "ieee"),
    "torch.backends.cudnn.conv.fp32_precision = 'ieee'": ("ieee", "ieee"),
    "torch.backends.cudnn.conv.fp32_precision = 'tf32'": ("tf32", "ieee"),
    "torch.backends.cudnn.conv.fp32_precision = 'none'": ("ieee", "ieee"),
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": ("tf32", "tf32"),
    "torch.backends.cuda.matmul.fp32_precision = 'ieee'": ("tf32", "ieee"),
    "torch.backends.cudnn.allow_tf32 = False": ("ieee", "ieee"),
    "torch.backends.cuda.matmul.allow_tf32 = True": ("tf32", "tf32"),
    "torch.set_float32_matmul_precision('high')": ("tf32", "tf32"),
    "torch.backends.fp32_precision = 'tf32'": ("tf32", "tf32"),
    "torch.backends.cudnn.conv.fp32_precision = 'none'; torch.backends.fp32_precision = 'tf32'": ("tf32", "tf32"),
    "torch.backends.cudnn.conv.fp32_precision = 'none'; torch.backends.cudnn.fp32_precision = 'tf32'": ("tf32", "tf32"),
}


def in_a_new_process(lines: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_every_switch_old_and_new():
    """Each in a child of one process: some settings cannot be taken back."""
    lines = f"""
import os, torch
from doublehead.ops._triton import convolution_precision, matmul_precision
for switch in {list(SWITCHES)!r}:
    if not os.fork():
        exec(switch)
        print(convolution_precision(torch.float32), matmul_precision(torch.float32), flush=True)
        print(convolution_precision(torch.float16), matmul_precision(torch.bfloat16), flush=True)
        os._exit(0)
    os.wait()
"""
    found = in_a_new_process(lines)
    assert len(found) == 4 * len(SWITCHES)
    for index, (switch, expected) in enumerate(SWITCHES.items()):
        assert tuple(found[4 * index : 4 * index + 2]) == expected, switch
        assert found[4 * index + 2 : 4 * index + 4] == ["ieee", "ieee"], switch


@pytest.mark.parametrize("allowed", ["tf32", "ieee"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_variant_that_is_launched(monkeypatch, dtype, allowed):
    """Exact float32 is the library's: Triton's would leave the tensor cores."""
    pytest.importorskip("triton")
    from doublehead.ops.fused_conv import kernel

    launched, referred = [], []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: launched.append(constants["PRECISION"])

    monkeypatch.setattr(kernel, "fused_conv_kernel", Kernel())
    monkeypatch.setattr(kernel.reference, "fused_conv", lambda *arguments: referred.append(arguments))
    monkeypatch.setattr(kernel, "convolution_precision", lambda dtype: allowed if dtype == torch.float32 else "ieee")
    x, weight = torch.zeros(49, 32, dtype=dtype), torch.zeros(64, 32, dtype=dtype)
    kernel.fused_conv(FusedConvArguments(x, weight, None, None, None, None, [7, 7], True, False))
    exact = dtype == torch.float32 and allowed == "ieee"
    assert launched == ([] if exact else ["tf32" if dtype == torch.float32 else "ieee"])
    assert len(referred) == exact


class Recorder(TorchDispatchMode):
    """The names of ATen's operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("product", [True, False])
def test_1x1_convolutions_in_training(monkeypatch, product):
    """float32 on a GPU calls the convolution, which the convolutions' switch governs; the results are the same."""
    monkeypatch.setattr(reference, "is_matrix_product", lambda rows: product)
    monkeypatch.setattr(gradient, "is_matrix_product", lambda rows: product)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2 * 15, 8, generator=generator, dtype=torch.float64)
    weight = gradient.kernel_of(torch.randn(6, 8, 1, 1, generator=generator, dtype=torch.float64), torch.float64)
    grad = torch.randn(2 * 15, 6, generator=generator, dtype=torch.float64)
    with Recorder() as recorder:
        y = gradient.convolve(rows, weight, None, (5, 3))
        grad_rows, grad_weight = gradient.convolve_backward(grad, rows, weight, (5, 3))
    torch.testing.assert_close(y, rows @ weight.t())
    torch.testing.assert_close(grad_rows, grad @ weight)
    torch.testing.assert_close(grad_weight, grad.t() @ rows)
    assert ({"convolution", "convolution_backward"} <= recorder.names) != product
    assert ({"mm"} <= recorder.names) == product


def test_which_1x1_convolutions_are_matrix_products():
    class Rows:
        def __init__(self, device, dtype):
            self.device, self.dtype = torch.device(device), dtype

    assert not reference.is_matrix_product(Rows("cuda", torch.float32))
    assert reference.is_matrix_product(Rows("cuda", torch.bfloat16))
    assert reference.is_matrix_product(Rows("cpu", torch.float32))
