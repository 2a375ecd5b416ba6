"""PyTorch's operators in a forked child, where they must run in one thread."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch


class _Process:
    """Whether this process is a forked child.  Its parent's threads are not in it, but OpenMP waits for them."""

    forked = False


def _note_fork() -> None:
    _Process.forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


_NOTHING = contextlib.nullcontext()


def one_thread_if_forked() -> contextlib.AbstractContextManager:
    """In a forked child, torch's operators run in this thread alone inside; otherwise they might wait for ever.

    PyTorch's own DataLoader does the same for its workers.  The compiled kernels look after themselves.
    """
    if torch.compiler.is_compiling() or not _Process.forked:
        return _NOTHING
    return _one_thread()
