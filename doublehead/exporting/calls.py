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
        _check_process(self._process, "compiled code")
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
    """A model that OpenVINO compiled: a request for each thread, in the process that compiled it.

    In a forked process OpenVINO's threads no longer exist.  Most calls there do without them, and some wait for ever;
    so does compiling again.

    Args:
        compiled: an `openvino.CompiledModel`.
    """

    def __init__(self, compiled: Any) -> None:
        self._compiled, self._own, self._process = compiled, threading.local(), os.getpid()

    def __call__(self, pixels: Tensor, sizes: Tensor) -> list[Tensor]:
        _check_process(self._process, "OpenVINO")
        if not hasattr(self._own, "request"):
            self._own.request = self._compiled.create_infer_request()
        inputs = {"pixels": pixels.detach().numpy(), "sizes": sizes.detach().numpy()}
        results = self._own.request.infer(inputs, share_inputs=True)
        return [torch.from_numpy(results[name]) for name in OUTPUTS]


def _check_process(opened_in: int, waiting: str) -> None:
    """Refuse to run in another process than the program was opened in."""
    if os.getpid() != opened_in:
        raise RuntimeError(
            f"this program was opened in process {opened_in}, of which process {os.getpid()} is a fork, where "
            f'{waiting} would wait for threads that are gone: start processes by "spawn" or "forkserver", and open it '
            "there"
        )
