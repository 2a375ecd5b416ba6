"""Calls an opened program safely from several threads and from forked processes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .description import OUTPUTS

Call = Callable[[Tensor, Tensor], Sequence[Tensor]]


class PackageCall:
    """An AOTInductor package: one call at a time, in the process that opened it.

    Two concurrent calls would deadlock: the second waits inside the package while it holds Python's GIL, which the
    first needs to dispatch operators.  So calls wait here, on a lock that releases the GIL.  In a forked process the
    OpenMP threads, for which compiled code would wait, no longer exist.
    """

    def __init__(self, compiled: Call) -> None:
        self._compiled, self._lock, self._process = compiled, threading.Lock(), os.getpid()

    def __call__(self, pixels: Tensor, sizes: Tensor) -> Sequence[Tensor]:
        if os.getpid() != self._process:
            raise RuntimeError(
                f"this package was opened in process {self._process}, of which process {os.getpid()} is a fork, where "
                'compiled code would wait for threads that are gone: start processes by "spawn" or "forkserver", and '
                "open it there"
            )
        with self._lock:
            return self._compiled(pixels, sizes)


class SessionCall:
    """An ONNX session, which allows concurrent calls; a forked process opens its own session.

    Args:
        open_session: opens another session.
        session: the open session.
    """

    def __init__(self, open_session: Callable[[], Any], session: Any) -> None:
        self._open, self._session, self._process = open_session, session, os.getpid()

    def __call__(self, pixels: Tensor, sizes: Tensor) -> list[Tensor]:
        if os.getpid() != self._process:  # the old session's threads do not exist here; its memory is never freed
            self._kept, self._session, self._process = self._session, self._open(), os.getpid()
        results = self._session.run(None, {"pixels": pixels.detach().numpy(), "sizes": sizes.detach().numpy()})
        return [torch.from_numpy(result) for result in results]


class RequestCall:
    """A model that OpenVINO compiled: a request for each thread; a forked process compiles its own model.

    Args:
        compile_model: compiles another `openvino.CompiledModel`.
        compiled: the compiled one.
    """

    def __init__(self, compile_model: Callable[[], Any], compiled: Any) -> None:
        self._compile, self._compiled, self._process = compile_model, compiled, os.getpid()
        self._own = threading.local()

    def __call__(self, pixels: Tensor, sizes: Tensor) -> list[Tensor]:
        request = self._request()
        results = request.infer({"pixels": pixels.detach().numpy(), "sizes": sizes.detach().numpy()}, share_inputs=True)
        return [torch.from_numpy(results[name]) for name in OUTPUTS]

    def _request(self) -> Any:
        process = os.getpid()
        if process != self._process:  # the threads of the old one do not exist here; its memory is never freed
            self._kept, self._compiled, self._process = (self._compiled, self._own), self._compile(), process
            self._own = threading.local()
        if not hasattr(self._own, "request"):
            self._own.request = self._compiled.create_infer_request()
        return self._own.request
