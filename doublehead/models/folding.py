"""Weights prepared once for inference, and again when the originals change."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def fold_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that does what `conv` and then `norm` do at inference."""
    scale = torch.rsqrt(norm.running_var + norm.eps) * norm.weight
    mean = norm.running_mean if conv.bias is None else norm.running_mean - conv.bias
    return conv.weight * scale.view(-1, 1, 1, 1), norm.bias - mean * scale


def compute_dtype(x: Tensor) -> torch.dtype:
    """In which dtype a layer would run on `x`: autocast's where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class FoldedWeights:
    """Remembers what was made from some tensors, until one of them changes.

    A change is another tensor, other memory, or an operation in place, which raises PyTorch's version counter:
    optimizers, `load_state_dict` and `copy_` do.  Writing through `.data` or by a captured CUDA graph does not; then
    call `forget`.  While torch.compile or export traces, nothing is remembered: the preparation becomes part of the
    graph.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Prepare anew at the next call."""
        self._seen: list[tuple[Tensor, int]] = []
        self._kind: Any = None
        self._made: Any = None

    def get(self, tensors: Iterable[Tensor], kind: Any, make: Callable[[], Any]) -> Any:
        """What `make()` gives for these tensors and this `kind` (dtype, ...), remembered."""
        if torch.compiler.is_compiling():
            return make()
        tensors = list(tensors)
        if any(tensor.is_inference() for tensor in tensors):  # they have no version counter
            with torch.no_grad():
                return make()
        if kind != self._kind or not self._unchanged(tensors):
            with torch.inference_mode(False), torch.no_grad():
                self._made = make()
            # Aliases keep the memory alive: nothing else can come to lie at the same address.
            self._seen = [(tensor.detach(), tensor._version) for tensor in tensors]
            self._kind = kind
        return self._made

    def _unchanged(self, tensors: list[Tensor]) -> bool:
        return len(tensors) == len(self._seen) and all(
            tensor.data_ptr() == seen.data_ptr() and tensor._version == version
            for tensor, (seen, version) in zip(tensors, self._seen, strict=True)
        )

    def __deepcopy__(self, memo: dict) -> FoldedWeights:
        return FoldedWeights()

    def __getstate__(self) -> dict:
        return {"_seen": [], "_kind": None, "_made": None}
