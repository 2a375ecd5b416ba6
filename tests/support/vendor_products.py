"""cuBLAS's and cuDNN's fused products on CPU tensors, for the conv-head: stand-ins that compute what the kernels do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from doublehead.ops import cublas
from tests.support.cudnn_standin import cuda_on_cpu


def _addmm_relu(bias: Tensor, x: Tensor, weight: Tensor, *, use_gelu: bool) -> Tensor:
    """ReLU makes 0 of NaN, as the vendor's may."""
    assert not use_gelu
    y = torch.addmm(bias, x, weight)
    return torch.where(y > 0, y, 0)


@pytest.fixture
def vendor_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CPU tensors count as a GPU's of compute capability 9.0, where products are concerned."""
    pytest.importorskip("triton")
    from doublehead.ops.conv_head import launch

    monkeypatch.setattr(cublas, "DEVICES", ("cpu",))
    monkeypatch.setattr(torch, "_addmm_activation", _addmm_relu)
    monkeypatch.setattr(launch, "capability_of", lambda x: (9, 0))
    with cuda_on_cpu():
        yield
