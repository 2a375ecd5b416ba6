"""Score fusion in plain PyTorch: the definition, for any device.

Both heads' logits become probabilities, in float32 (float64 where an input is float64).  A row with a NaN or +inf
logit, or with nothing but -inf, has no probabilities: they are NaN, and so is every score made of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._dtypes import score_dtype

FUSIONS = {
    "complementary": lambda fc, conv: fc + conv * (1 - fc),
    "max": torch.maximum,
    "average": lambda fc, conv: (fc + conv) / 2,
    "none": lambda fc, conv: fc,
}
"""How the fc-head's and the conv-head's probabilities become one score (Table 3 of the paper)."""


def fuse_scores(fc_logits: Tensor, conv_logits: Tensor, method: str) -> Tensor:
    """The scores: `Tensor[N, C]`.

    Args:
        fc_logits, conv_logits: `Tensor[N, C]`.
        method: one of `FUSIONS`.
    """
    dtype = score_dtype(fc_logits, conv_logits)
    return FUSIONS[method](_softmax(fc_logits, dtype), _softmax(conv_logits, dtype))


def fuse_scores_backward(grad: Tensor, fc_logits: Tensor, conv_logits: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """The gradients of both logits, each in its own dtype, from that of the scores, `Tensor[N, C]`."""
    dtype = score_dtype(fc_logits, conv_logits)
    fc, conv = _softmax(fc_logits, dtype), _softmax(conv_logits, dtype)
    grad = grad.to(dtype)
    if method == "none":
        return _softmax_backward(grad, fc).to(fc_logits.dtype), torch.zeros_like(conv_logits)
    if method == "complementary":
        grad_fc, grad_conv = grad * (1 - conv), grad * (1 - fc)
    elif method == "max":
        shared = torch.where(fc == conv, grad / 2, grad)
        grad_fc, grad_conv = shared.masked_fill(fc < conv, 0), shared.masked_fill(conv < fc, 0)
    else:
        grad_fc = grad_conv = grad / 2
    return (
        _softmax_backward(grad_fc, fc).to(fc_logits.dtype),
        _softmax_backward(grad_conv, conv).to(conv_logits.dtype),
    )


def _softmax(logits: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.softmax(logits, dim=-1, dtype=dtype)


def _softmax_backward(grad: Tensor, probabilities: Tensor) -> Tensor:
    return (grad - (grad * probabilities).sum(-1, keepdim=True)) * probabilities
