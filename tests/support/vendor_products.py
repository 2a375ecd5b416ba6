"""cuBLAS's and cuDNN's fused products on CPU tensors: stand-ins that compute what the vendor's kernels do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from doublehead.ops import cublas, cudnn


def hiding_relu(x: Tensor) -> Tensor:
    """ReLU that makes 0 of NaN, as a vendor's may."""
    return torch.where(x > 0, x, torch.zeros_like(x))


def _relu(x, weight, bias, stride, padding, dilation, groups):
    return hiding_relu(conv2d(x, weight, bias, stride, padding, dilation, groups))


def _add_relu(x, weight, to, alpha, bias, stride, padding, dilation, groups):
    assert alpha == 1 and x.is_contiguous(memory_format=torch.channels_last)
    assert to.is_contiguous(memory_format=torch.channels_last)
    return hiding_relu(conv2d(x, weight, bias, stride, padding, dilation, groups) + to)


def _addmm_relu(bias, x, weight, *, use_gelu):
    assert not use_gelu
    return hiding_relu(torch.addmm(bias, x, weight))


@pytest.fixture
def vendor_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CPU tensors count as a GPU's of compute capability 9.0, where products are concerned."""
    pytest.importorskip("triton")
    from doublehead.ops.conv_head import launch

    for module in (cublas, cudnn):
        monkeypatch.setattr(module, "DEVICES", ("cpu",))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch, "_addmm_activation", _addmm_relu)
    monkeypatch.setattr(launch, "capability_of", lambda x: (9, 0))
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("cudnn_convolution_relu", _relu, "CPU")
        library.impl("cudnn_convolution_add_relu", _add_relu, "CPU")
        yield
