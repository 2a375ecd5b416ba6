"""Float32 in the non-local block on CUDA: which switch of PyTorch's decides over which product.

Tensors without contents stand in for a GPU's: what is asked, is which operators run, and with which options.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from doublehead.ops import NonLocalBlock

PRODUCTS = ("convolution", "mm", "addmm", "bmm", "baddbmm", "fused_conv")


class Products(TorchDispatchMode):
    """Notes the products that run on CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        if name in PRODUCTS:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def make(dtype: torch.dtype, device: str) -> NonLocalBlock:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # tensors without contents do not let themselves be moved later
    try:
        with torch.device(device):
            return NonLocalBlock(32)
    finally:
        torch.set_default_dtype(before)


def products(dtype: torch.dtype, training: bool, device: str = "cuda", sync: bool = False) -> set[str]:
    with FakeTensorMode():
        block = make(dtype, device)
        if sync:
            block.norm.__class__ = type("OtherNorm", (torch.nn.BatchNorm2d,), {})
        block.train(training)
        x = torch.empty(2, 32, 7, 7, device=device, dtype=dtype, requires_grad=training)
        with torch.set_grad_enabled(training), Products() as seen:
            y = block(x)
            assert y.shape == x.shape and y.dtype == dtype
    return set(seen.names)


def test_float32_projections_in_training_are_convolutions():  # and their gradients are what autograd makes of them
    assert products(torch.float32, True) == {"convolution"}


def test_so_they_are_around_a_norm_of_another_type():
    assert products(torch.float32, True, sync=True) == {"convolution"}


def test_float32_projections_at_inference_follow_the_convolutions():
    assert products(torch.float32, False) == {"convolution", "fused_conv"}  # `fused_conv` follows them by itself


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_take_matrix_products(dtype):
    assert products(dtype, True) == {"addmm"} and products(dtype, False) == {"addmm", "fused_conv"}


def test_so_does_the_cpu():
    assert "convolution" not in products(torch.float32, True, device="cpu")


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_the_attention_follows_the_matrix_products(triton_kernels, monkeypatch, precision):
    from doublehead.ops.non_local import kernel

    class Launched:
        def __init__(self, function) -> None:
            self.function, self.precisions, self.arg_names = function, [], function.arg_names

        def __getitem__(self, grid):
            def launch(*arguments, PRECISION, **options):
                self.precisions.append(PRECISION)
                self.function[grid](*arguments, PRECISION=PRECISION, **options)

            return launch

    kernels = [Launched(getattr(kernel, name)) for name in ("forward", "backward_whole")]
    monkeypatch.setattr(kernel, "forward", kernels[0])
    monkeypatch.setattr(kernel, "backward_whole", kernels[1])
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"  # PyTorch's default, which must not matter here
    switches, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    switches.fp32_precision = precision
    qkv = torch.randn(1, 4, 48, device=triton_kernels, requires_grad=True)
    try:
        torch.ops.doublehead.non_local_attention(qkv, 1, False, 0.25).sum().backward()
    finally:
        switches.fp32_precision = before
    assert [launched.precisions for launched in kernels] == [[precision], [precision]]
