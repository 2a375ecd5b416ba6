"""Winograd's convolution F(4 x 4, 3 x 3) in plain PyTorch, with its matrices made from their points.

A. Lavin, S. Gray: Fast Algorithms for Convolutional Neural Networks (2016).  A tile of 6 x 6 inputs gives 4 x 4
outputs by 36 multiplications instead of 144: a correlation with 3 weights is a product of polynomials, and that is done
by their values at five points and at infinity.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn.functional import pad

POINTS = (0.0, 0.625, -0.625, 1.5, -1.5)
"""Without infinity.  5/8 and 3/2 have less than half the rounding errors of the usual 1 and 2, and exact constants."""
OUTPUTS = 4
"""Of a tile, along each side."""
INPUTS = OUTPUTS + 2
PANEL = 16
"""Output channels whose packed weights lie together."""


@functools.cache
def matrices() -> tuple[Tensor, Tensor, Tensor]:
    """`A^T` `[4, 6]`, `G` `[6, 3]` and `B^T` `[6, 6]` in float64."""
    sizes = ((OUTPUTS, INPUTS), (INPUTS, 3), (INPUTS, INPUTS))
    backward, kernel, forward = (torch.zeros(size, dtype=torch.float64) for size in sizes)
    for index, point in enumerate(POINTS):
        others = [other for other in POINTS if other != point]
        scale = math.prod(point - other for other in others)
        backward[:, index] = torch.tensor([point**power for power in range(OUTPUTS)])
        kernel[index] = torch.tensor([point**power / scale for power in range(3)], dtype=torch.float64)
        forward[index, :-1] = _with_roots(others)
    backward[-1, -1] = kernel[-1, -1] = 1
    forward[-1] = _with_roots(POINTS)
    return backward, kernel, forward


def _with_roots(roots) -> Tensor:
    """Coefficients of the polynomial with these roots, the constant first."""
    coefficients = torch.ones(1, dtype=torch.float64)
    for root in roots:
        coefficients = pad(coefficients, (1, 0)) - root * pad(coefficients, (0, 1))
    return coefficients


def pack(weight: Tensor) -> Tensor:
    """Weights `Tensor[O, I, 3, 3]` -> `Tensor[36, ceil(O / 16), I, 16]`: transformed in float64, rounded once."""
    kernel = matrices()[1].to(weight.device)
    kernels = weight.permute(2, 3, 0, 1).flatten(0, 1)  # [9, O, I]
    kernels = pad(kernels, (0, 0, 0, -len(weight) % PANEL)).unflatten(1, (-1, PANEL)).transpose(2, 3)
    planes = torch.kron(kernel, kernel) @ kernels.double().flatten(1)
    return planes.to(weight.dtype).view(-1, *kernels.shape[1:])


def winograd(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, outputs: int, relu: bool
) -> Tensor:
    """As the operator: `Tensor[N, H, W, I]` -> `Tensor[N, H, W, O]`."""
    backward, _, forward = (matrix.to(x) for matrix in matrices())
    height, width = x.shape[1:3]
    down, across = -(-height // OUTPUTS), -(-width // OUTPUTS)
    padded = pad(x, (0, 0, 1, across * OUTPUTS - width + 1, 1, down * OUTPUTS - height + 1))
    tiles = padded.unfold(1, INPUTS, OUTPUTS).unfold(2, INPUTS, OUTPUTS)  # [N, down, across, I, 6, 6]
    tiles = torch.einsum("ai,ntscij,bj->abntsc", forward, tiles, forward)
    planes = weight.transpose(2, 3).flatten(1, 2)[:, :outputs].unflatten(0, (INPUTS, INPUTS))
    products = torch.einsum("abntsc,aboc->abntso", tiles, planes)
    y = torch.einsum("ia,abntso,jb->ntisjo", backward, products, backward)
    y = y.reshape(len(x), down * OUTPUTS, across * OUTPUTS, outputs)[:, :height, :width]
    y = y if bias is None else y + bias
    y = y if residual is None else y + residual
    return (y.relu() if relu else y).contiguous()
