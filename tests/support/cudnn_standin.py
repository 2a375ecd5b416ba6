"""cuDNN's fused convolutions on CPU tensors, and the networks that run on CUDA by them.

PyTorch has the operators in every build, with a kernel for CUDA alone.  The stand-ins compute in float32 and round
once; their ReLU makes 0 of NaN, and they refuse what the kernels would copy or not take.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d
from torch.utils._python_dispatch import TorchDispatchMode

from doublehead.models.folded import guards, linear, networks
from doublehead.models.folded.on_cuda import CudnnWeights
from doublehead.ops import cublas, cudnn

LAST = torch.channels_last


def _relu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0)


def _convolve(x, weight, bias, stride, padding, dilation, groups) -> Tensor:
    step = cudnn.channel_step(x.dtype)
    assert x.dtype == weight.dtype == bias.dtype and x.dtype != torch.float64
    assert x.is_contiguous(memory_format=LAST) and weight.is_contiguous(memory_format=LAST)
    assert x.shape[1] % step == weight.shape[0] % step == 0 and groups == 1 and list(dilation) == [1, 1]
    return conv2d(x.float(), weight.float(), bias.float(), stride, padding).contiguous(memory_format=LAST)


def _conv_relu(x, weight, bias, stride, padding, dilation, groups) -> Tensor:
    return _relu(_convolve(x, weight, bias, stride, padding, dilation, groups)).to(x.dtype)


def _conv_add_relu(x, weight, z, alpha, bias, stride, padding, dilation, groups) -> Tensor:
    y = _convolve(x, weight, bias, stride, padding, dilation, groups)
    assert z.shape == y.shape and z.dtype == x.dtype and z.is_contiguous(memory_format=LAST)
    assert z.data_ptr() != x.data_ptr()
    return _relu(y + alpha * z.float()).to(x.dtype)


@contextlib.contextmanager
def cuda_on_cpu() -> Iterator[None]:
    """Inside, `models.folded` runs CPU tensors as it runs those on CUDA."""
    with pytest.MonkeyPatch.context() as patch, torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("cudnn_convolution_relu", _conv_relu, "CPU")
        library.impl("cudnn_convolution_add_relu", _conv_add_relu, "CPU")
        for module in (cublas, cudnn):
            patch.setattr(module, "DEVICES", ("cpu",))
        patch.setattr(torch.backends.cudnn, "is_available", lambda: True)
        patch.setitem(networks.ENGINES, "cpu", CudnnWeights)
        patch.setitem(linear.PRODUCTS, "cpu", linear.CublasProducts)
        yield


VIEWS = {"lift_fresh", "detach", "alias", "_unsafe_view"}
"""Operators that launch nothing, though their schemas do not say so; also new memory and questions."""
NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "device", "promote_types"}


class Launches(TorchDispatchMode):
    """Counts the operators that launch work, by name: not views, questions and new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.calls: list[tuple[str, tuple]] = []

    @property
    def total(self) -> int:
        return self.counts.total()

    def __enter__(self):
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(guards, "in_dispatch_mode", lambda: False)  # a watcher would see the modules run
        return super().__enter__()

    def __exit__(self, *error):
        self._patch.undo()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        name = function._schema.name.split("::")[1]
        if not (function.is_view or name in VIEWS or name in NOTHING):
            self.counts[name] += 1
            self.calls.append((name, arguments))
        return result
