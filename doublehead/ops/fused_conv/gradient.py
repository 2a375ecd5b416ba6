"""Convolutions of RoI maps in training, and their gradients, for autograd functions that keep their own record."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import as_maps, as_rows, convolve, is_matrix_product

__all__ = ["convolve", "convolve_backward"]


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
        weight: `Tensor[out, in, k, k]`.
        size: (H, W).
        add_to: `Tensor[N * H * W, in]`, another gradient of the rows.  It is overwritten by the sum.
        of_rows, of_weight: which are wanted; None is returned for the other.
    """
    padding = weight.shape[2] // 2
    if not padding and is_matrix_product(rows):
        flat = weight.flatten(1)
        grad_weight = (grad.t() @ rows).view_as(weight) if of_weight else None
        if not of_rows:
            return None, grad_weight
        return (grad @ flat if add_to is None else add_to.addmm_(grad, flat)), grad_weight
    grad_maps, grad_weight, _ = torch.ops.aten.convolution_backward.default(
        as_maps(grad, size), as_maps(rows, size), weight, None, [1, 1], [padding, padding], [1, 1], False, [0, 0], 1,
        [of_rows, of_weight, False],
    )  # fmt: skip
    grad_rows = as_rows(grad_maps) if of_rows else None
    return (grad_rows if add_to is None or grad_rows is None else add_to.add_(grad_rows)), grad_weight
