"""bfloat16 products in Triton's interpreter, which multiplies the bits as if they were integers: emulated."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.support.interpreter import TRITON_DEVICE


@pytest.fixture
def upcast_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the interpreter `tl.dot` upcasts bfloat16 to float32 and multiplies that: a GPU's sums, in another order.

    An emulation: it runs the kernels' bfloat16 path, and proves nothing of a GPU's products.
    """
    if TRITON_DEVICE == "cuda":
        yield
        return
    pytest.importorskip("triton")
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot = InterpreterBuilder.create_dot

    def upcast(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = torch.from_numpy(handle.data.view("int16").copy())
        return TensorHandle(bits.view(torch.bfloat16).float().numpy(), tl.float32)

    def dot(self, a, b, *rest):
        return create_dot(self, upcast(a), upcast(b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    yield
