"""Calls of opened programs that may come from several threads, and from processes forked since."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Call = Callable[[Tensor, Tensor], Sequence[Tensor]]


class PackageCall:
    """An AOTInductor package: one call at a time, in the process that opened it.

    Of two calls at once, the second waits within the package for the first, and keeps Python's lock, which the first
    needs to dispatch operators: both would stand still.  Waiting here keeps nothing.  In a forked process the threads
    of OpenMP are gone, which compiled code would wait for.
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
    """An ONNX session, which takes several calls at once; a forked process gets one of its own.

    Args:
        open_session: makes a session.
        session: the one that is open already.
    """

    def __init__(self, open_session: Callable[[], Any], session: Any) -> None:
        self._open, self._session, self._process = open_session, session, os.getpid()

    def __call__(self, pixels: Tensor, sizes: Tensor) -> list[Tensor]:
        if os.getpid() != self._process:  # the old one's threads are not here; its memory is left alone
            self._kept, self._session, self._process = self._session, self._open(), os.getpid()
        results = self._session.run(None, {"pixels": pixels.detach().numpy(), "sizes": sizes.detach().numpy()})
        return [torch.from_numpy(result) for result in results]
