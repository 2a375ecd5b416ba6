"""Triton's kernels on CPU tensors: in its interpreter, which TRITON_INTERPRET=1 chooses before they are imported."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

#: Where Triton's kernels run in the tests. Without a GPU that is the CPU, in Triton's interpreter.
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def kernels_on_cpu() -> Iterator[None]:
    """Inside, `torch.ops.doublehead` serves CPU tensors by the Triton kernels."""
    from doublehead.ops._library import LAUNCHERS, NAMESPACE, TRITON_KERNELS

    with torch.library._scoped_library(NAMESPACE, "IMPL") as library:
        for name, launch in TRITON_KERNELS.items():
            library.impl(name, launch, "CPU", allow_override=True)
        LAUNCHERS["cpu"] = TRITON_KERNELS
        try:
            yield
        finally:
            del LAUNCHERS["cpu"]
