"""Weights prepared once for inference, and again when the originals change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as torch_module

from ._library import is_functorch_tensor

STREAMING_DEVICES = ("cuda",)
"""Types of device that queue work on streams: a call returns before its work is done."""


_GLOBAL_HOOKS = (
    "_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks",
)  # fmt: skip


def has_global_hooks() -> bool:
    """Whether hooks wait on the calls of all modules of this process."""
    return any(getattr(torch_module, name) for name in _GLOBAL_HOOKS)


def has_inner_hooks(module: nn.Module) -> bool:
    """Whether hooks wait on modules inside `module`, or a `forward` set on one of them, as other libraries do.

    These only run if the modules are called.  So do hooks for all modules.  Not while torch.compile or export traces.
    """
    if torch.compiler.is_compiling():
        return False
    if has_global_hooks():
        return True
    for inner in inner_modules(module):  # loops, here and below: at each call of a head, and any() takes twice as long
        if inner._forward_hooks or inner._forward_pre_hooks or "forward" in inner.__dict__:
            return True
        if inner._backward_hooks or inner._backward_pre_hooks:
            return True
    return False


def inner_modules(module: nn.Module) -> list[nn.Module]:
    """The modules inside `module`, those in several places each time.  `module.modules()` takes five times as long."""
    found = [module]
    for outer in found:  # which grows
        for inner in outer._modules.values():
            if inner is not None:
                found.append(inner)  # noqa: PERF401
    return found[1:]


def is_plain_conv(layer: nn.Module, bias: bool = False) -> bool:
    """Whether this is PyTorch's own convolution, with or without a bias, of stride 1 and to maps of the same size."""
    if type(layer) is not nn.Conv2d or (layer.bias is not None) is not bias:
        return False
    height, width = layer.kernel_size
    settings = layer.stride, layer.dilation, layer.groups, layer.padding, layer.padding_mode
    return settings == ((1, 1), (1, 1), 1, (height // 2, width // 2), "zeros")


class FoldedWeights:
    """Caches what was computed from some tensors, until one of them changes.

    A change is another tensor, other memory, or an operation in place, which raises PyTorch's version counter:
    optimizers, `load_state_dict` and `copy_` do.  Writing through `.data` or by a captured CUDA graph does not; call
    `forget` after it.  While torch.compile or export traces, nothing is cached: the computation becomes part of the
    graph.  The same holds while a CUDA graph is captured and the cache is empty or out of date: the result has no
    contents before the graph runs.

    Streams and threads may share the cache: work on another CUDA stream than the one that filled it waits for it.  A
    capture does not wait: `torch.cuda.graph` synchronises the device before it begins; whoever captures by other means
    must do so too.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Empties the cache: the next call computes again."""
        self._fold: _Fold | None = None

    def get(self, tensors: Iterable[Tensor], kind: Any, make: Callable[[], Any]) -> Any:
        """The result of `make()` for these tensors and this `kind` (dtype, ...), from the cache if it is there."""
        if torch.compiler.is_compiling():
            return make()
        tensors = list(tensors)
        if any(_untraceable(tensor) for tensor in tensors):
            with torch.no_grad():
                return make()
        fold = self._fold  # read once: another thread may replace it
        if fold is not None and fold.comes_from(tensors, kind):
            if fold.event is not None:
                fold.event.wait()
            return fold.result
        with torch.inference_mode(False), torch.no_grad():
            result = make()
        device = tensors[0].device if tensors else None
        on_streams = device is not None and device.type in STREAMING_DEVICES
        if on_streams and torch.cuda.is_current_stream_capturing():
            return result
        # The aliases keep the memory alive, so that no other tensor gets the same address.
        sources = [(tensor.detach(), tensor._version) for tensor in tensors]
        self._fold = _Fold(sources, kind, result, _WriteEvent(device, result) if on_streams else None)
        return result

    def tensors(self) -> list[Tensor]:
        """The cached tensors, for a caller that keeps them alive beyond the next `get` or `forget`."""
        fold = self._fold
        return [] if fold is None else list(_tensors_in(fold.result))

    def __deepcopy__(self, memo: dict) -> FoldedWeights:
        return FoldedWeights()

    def __getstate__(self) -> dict:
        return {"_fold": None}  # CUDA events cannot be pickled

    def __setstate__(self, state: dict) -> None:
        self.forget()


class _Fold(NamedTuple):
    """A cached result and the tensors that it comes from."""

    sources: list[tuple[Tensor, int]]
    """Each tensor with its version."""
    kind: Any
    result: Any
    event: _WriteEvent | None
    """None on a device without streams, where the result is complete."""

    def comes_from(self, tensors: list[Tensor], kind: Any) -> bool:
        return (
            kind == self.kind
            and len(tensors) == len(self.sources)
            and all(
                tensor.data_ptr() == source.data_ptr()
                and tensor._version == version
                and tensor.stride() == source.stride()  # `weight.data = weight.data.mT` is the same memory
                and tensor.shape == source.shape
                for tensor, (source, version) in zip(tensors, self.sources, strict=True)
            )
        )


class _WriteEvent:
    """The moment when tensors are written on the stream that is current now; other streams wait for it.

    The other streams are recorded with the allocator too: otherwise it could reuse the tensors' memory, once they are
    forgotten, while kernels there still read them.
    """

    def __init__(self, device: torch.device, result: Any) -> None:
        stream = torch.cuda.current_stream(device)
        self._device, self._tensors = device, list(_tensors_in(result))
        self._done = torch.cuda.Event()
        self._done.record(stream)
        self._ordered = {stream.cuda_stream}
        """Streams whose further work comes after the writing."""

    def wait(self) -> None:
        """Makes further work on the current stream wait; the host does not."""
        stream = torch.cuda.current_stream(self._device)
        if stream.cuda_stream in self._ordered or torch.cuda.is_current_stream_capturing():
            return
        stream.wait_event(self._done)
        for tensor in self._tensors:
            tensor.record_stream(stream)
        self._ordered.add(stream.cuda_stream)


def _tensors_in(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (list, tuple)):
        for part in result:
            yield from _tensors_in(part)
    elif hasattr(result, "held_tensors"):
        yield from result.held_tensors()


def _untraceable(tensor: Tensor) -> bool:
    """Whether the tensor has no version counter (inference mode), no memory (torch.func's transforms) or no contents
    (fake tensors).
    """
    return tensor.is_inference() or isinstance(tensor, FakeTensor) or is_functorch_tensor(tensor)
