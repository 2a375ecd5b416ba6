"""Tensors beside memory that may not be touched, and a process apart that may die of it."""

from __future__ import annotations

import ctypes
import mmap
import os
import traceback
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)


def guarded(tensor: Tensor, behind: bool = True) -> Tensor:
    """A copy with the same strides, without a gap between its elements and the page behind it (or before it)."""
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + (pages if behind else 0)
    if _libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    offset = pages - size if behind else mmap.PAGESIZE
    flat = torch.frombuffer(memory, dtype=tensor.dtype, offset=offset, count=tensor.numel())
    return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def run_apart(function: Callable[[], object]) -> int:
    """Runs it in a copy of this process; its exit status, or minus the signal that ended it.

    The copy has this thread alone: nothing that PyTorch shares out among threads may run there.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns where there are threads
        child = os.fork()
    if child == 0:
        status = 1
        try:
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
