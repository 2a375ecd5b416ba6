"""Convolutions of RoI maps in training, and their gradients, for autograd functions that keep their own record."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import as_maps, as_rows, convolve, is_matrix_product

__all__ = ["convolve", "convolve_backward", "kernel_of"]


def kernel_of(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight of a 1x1 or 3x3 convolution in this dtype: `Tensor[out, in]` or `Tensor[out, in, 3, 3]`."""
    weight = weight.to(dtype)
    return weight.flatten(1) if weight.shape[2] == 1 else weight


def convolve_backward(
    grad: Tensor,
    rows: Tensor,
    weight: Tensor,
    size: Sequence[int],
    *,
    add_to: Tensor | None = None,
    of_rows: bool = True,
    of_weight: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `convolve`'s rows and weight.

    Args:
        grad: `Tensor[N * H * W, out]`, of the result.
        rows: `Tensor[N * H * W, in]`.
        weight: `Tensor[out, in]` or `Tensor[out, in, 3, 3]`.
        size: (H, W).
        add_to: `Tensor[N * H * W, in]`, another gradient of the rows.  It is overwritten by the sum.
        of_rows, of_weight: which are wanted; None is returned for the other.
    """
    if weight.dim() == 2 and is_matrix_product(rows):
        grad_weight = grad.t() @ rows if of_weight else None
        if not of_rows:
            return None, grad_weight
        return (grad @ weight if add_to is None else add_to.addmm_(grad, weight)), grad_weight
    kernel, padding = (weight, [1, 1]) if weight.dim() == 4 else (weight[:, :, None, None], [0, 0])
    grad_maps, grad_weight, _ = torch.ops.aten.convolution_backward.default(
        as_maps(grad, size), as_maps(rows, size), kernel, None, [1, 1], padding, [1, 1], False, [0, 0], 1,
        [of_rows, of_weight, False],
    )  # fmt: skip
    grad_rows = as_rows(grad_maps) if of_rows else None
    if grad_rows is not None and add_to is not None:
        grad_rows = add_to.add_(grad_rows)
    return grad_rows, None if grad_weight is None else grad_weight.view_as(weight)
