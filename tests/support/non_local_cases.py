"""What the tests of the non-local block share: inputs, the attention in float64, and the 2x rule."""

from __future__ import annotations

import torch
from torch import Tensor

from doublehead.ops.non_local import Attention, reference

OPERATORS = torch.ops.doublehead


def qkv_and_grad(number: int, cells: int, inner: int, dtype: torch.dtype, size: float = 1.0, seed: int = 0):
    """Queries, keys and values whose entries are about `size`, and a gradient of about 1."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(number, cells, 3 * inner, generator=generator) * size
    grad = torch.randn(number, cells, inner, generator=generator)
    return qkv.to(dtype), grad.to(dtype)


def plain_attention(qkv: Tensor, groups: int, softmax: bool, scale: float) -> Tensor:
    """The formula, one group at a time, for autograd to differentiate."""
    mixed = []
    for q, k, v in zip(*(part.chunk(groups, dim=2) for part in qkv.chunk(3, dim=2)), strict=True):
        weights = scale * q @ k.transpose(1, 2)
        mixed.append((weights.softmax(dim=2) if softmax else weights) @ v)
    return torch.cat(mixed, dim=2)


def exact(qkv: Tensor, grad: Tensor, *attention) -> tuple[Tensor, Tensor]:
    """Result and gradient in float64, the gradient by autograd."""
    qkv = qkv.detach().double().requires_grad_()
    out = plain_attention(qkv, *attention)
    return out.detach(), torch.autograd.grad(out, qkv, grad.double())[0]


def rounded(qkv: Tensor, grad: Tensor, *attention) -> tuple[Tensor, Tensor]:
    """The reference's result and gradient in the dtype of `qkv`."""
    return (
        reference.non_local_attention(qkv, Attention(*attention)),
        reference.non_local_attention_backward(grad, qkv, Attention(*attention)),
    )


def check_twice(actual: Tensor, plain: Tensor, expected: Tensor, roundings: int = 1) -> None:
    """The 2x rule: `actual` is no further from `expected` (float64) than twice `plain`, or some ulps of the largest."""
    assert actual.dtype == plain.dtype and actual.shape == plain.shape
    ulp = torch.finfo(plain.dtype).eps * expected.abs().max().item()
    allowed = 2 * (plain.double() - expected).abs().max().item() + roundings * ulp
    error = (actual.double().cpu() - expected).abs().max().item()
    assert error <= allowed, f"off by {error:.3g}, {allowed:.3g} allowed"  # NaN fails too
