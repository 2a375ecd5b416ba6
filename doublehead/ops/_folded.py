"""Weights prepared once for inference, and again when the originals change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ._library import is_functorch_tensor

STREAMING_DEVICES = ("cuda",)
"""Types of device where what was called is not yet done, but queued on a stream."""


class FoldedWeights:
    """Remembers what was made from some tensors, until one of them changes.

    A change is another tensor, other memory, or an operation in place, which raises PyTorch's version counter:
    optimizers, `load_state_dict` and `copy_` do.  Writing through `.data` or by a captured CUDA graph does not; then
    call `forget`.  While torch.compile or export traces, nothing is remembered: the preparation becomes part of the
    graph.  So it does where a CUDA graph is captured and nothing is remembered yet, or no longer: what it makes has no
    contents before the graph runs.

    Streams and threads may share it: on another CUDA stream than the one it was made on, work waits for it.  A capture
    does not wait: `torch.cuda.graph` synchronises the device before it begins, and who captures by other means must.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Prepare anew at the next call."""
        self._fold: _Fold | None = None

    def get(self, tensors: Iterable[Tensor], kind: Any, make: Callable[[], Any]) -> Any:
        """What `make()` gives for these tensors and this `kind` (dtype, ...), remembered."""
        if torch.compiler.is_compiling():
            return make()
        tensors = list(tensors)
        if any(_untraceable(tensor) for tensor in tensors):
            with torch.no_grad():
                return make()
        fold = self._fold  # read once: another thread may replace it
        if fold is not None and fold.made_from(tensors, kind):
            if fold.written is not None:
                fold.written.wait()
            return fold.made
        with torch.inference_mode(False), torch.no_grad():
            made = make()
        device = tensors[0].device if tensors else None
        on_streams = device is not None and device.type in STREAMING_DEVICES
        if on_streams and torch.cuda.is_current_stream_capturing():
            return made
        # Aliases keep the memory alive: nothing else can come to lie at the same address.
        seen = [(tensor.detach(), tensor._version) for tensor in tensors]
        self._fold = _Fold(seen, kind, made, _Written(device, made) if on_streams else None)
        return made

    def tensors(self) -> list[Tensor]:
        """The tensors in what is remembered, to keep them alive beyond the next `get` or `forget`."""
        fold = self._fold
        return [] if fold is None else list(_tensors_in(fold.made))

    def __deepcopy__(self, memo: dict) -> FoldedWeights:
        return FoldedWeights()

    def __getstate__(self) -> dict:
        return {"_seen": [], "_kind": None, "_made": None}

    def __setstate__(self, state: dict) -> None:
        self.forget()


class _Fold(NamedTuple):
    """What was made, and from what."""

    seen: list[tuple[Tensor, int]]
    kind: Any
    made: Any
    written: _Written | None
    """None: on a device without streams, where what is made is there."""

    def made_from(self, tensors: list[Tensor], kind: Any) -> bool:
        return (
            kind == self.kind
            and len(tensors) == len(self.seen)
            and all(
                tensor.data_ptr() == seen.data_ptr() and tensor._version == version
                for tensor, (seen, version) in zip(tensors, self.seen, strict=True)
            )
        )


class _Written:
    """When tensors are written, on the stream that is current now; other streams are made to wait for it.

    The allocator is told of the other streams too: else it could give the tensors' memory away, once they are
    forgotten, while kernels there still read them.
    """

    def __init__(self, device: torch.device, made: Any) -> None:
        stream = torch.cuda.current_stream(device)
        self._device, self._tensors = device, list(_tensors_in(made))
        self._done = torch.cuda.Event()
        self._done.record(stream)
        self._safe = {stream.cuda_stream}
        """Streams whose further work comes after the writing."""

    def wait(self) -> None:
        """Makes what the current stream does from here on wait; the host does not."""
        stream = torch.cuda.current_stream(self._device)
        if stream.cuda_stream in self._safe or torch.cuda.is_current_stream_capturing():
            return
        stream.wait_event(self._done)
        for tensor in self._tensors:
            tensor.record_stream(stream)
        self._safe.add(stream.cuda_stream)


def _tensors_in(made: Any) -> Iterator[Tensor]:
    if isinstance(made, Tensor):
        yield made
    elif isinstance(made, (list, tuple)):
        for part in made:
            yield from _tensors_in(part)


def _untraceable(tensor: Tensor) -> bool:
    """Has the tensor no version counter (made in inference mode), no memory (inside torch.func's transforms) or no
    contents (fake)?
    """
    return tensor.is_inference() or isinstance(tensor, FakeTensor) or is_functorch_tensor(tensor)
