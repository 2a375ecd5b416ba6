"""Triton kernels of score fusion: one program for each row of logits, all in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._dtypes import score_dtype
from .._triton import next_power_of_2
from . import reference

#: A row's classes are held in registers: the reference serves larger numbers.
MAX_CLASSES = 4096


@triton.jit
def softmax_row(logits, row, column, classes):
    """Probabilities of one row, 0 beyond its classes.  As in PyTorch a NaN or +inf logit makes the whole row NaN."""
    x = tl.load(logits + row * classes + column, mask=column < classes, other=-float("inf")).to(tl.float32)
    exponential = tl.exp(x - tl.max(x, 0))
    return tl.div_rn(exponential, tl.sum(exponential, 0))


@triton.jit
def fuse(fc, conv, METHOD: tl.constexpr):
    """`reference.FUSIONS`, but for "none"."""
    if METHOD == "complementary":
        scores = fc + conv * (1 - fc)
    elif METHOD == "max":
        scores = tl.maximum(fc, conv, propagate_nan=tl.PropagateNan.ALL)
    else:
        tl.static_assert(METHOD == "average")
        scores = (fc + conv) * 0.5
    return scores


@triton.jit
def _softmax_backward(grad, probabilities):
    return (grad - tl.sum(grad * probabilities, 0)) * probabilities


@triton.jit
def _forward(fc_logits, conv_logits, scores, classes, METHOD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    score = softmax_row(fc_logits, row, column, classes)
    if METHOD != "none":
        score = fuse(score, softmax_row(conv_logits, row, column, classes), METHOD)
    tl.store(scores + row * classes + column, score, mask=column < classes)


@triton.jit
def _backward(
    grad_scores, fc_logits, conv_logits, grad_fc_logits, grad_conv_logits, classes,
    METHOD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < classes
    offset = row * classes + column
    grad = tl.load(grad_scores + offset, mask=inside, other=0.0)
    fc = softmax_row(fc_logits, row, column, classes)
    if METHOD == "none":
        grad_fc = _softmax_backward(grad, fc)
        grad_conv = tl.zeros_like(grad)
    else:
        conv = softmax_row(conv_logits, row, column, classes)
        if METHOD == "complementary":
            grad_fc = grad * (1 - conv)
            grad_conv = grad * (1 - fc)
        elif METHOD == "max":
            shared = tl.where(fc == conv, grad * 0.5, grad)  # at a tie half to each, as torch.maximum
            grad_fc = tl.where(fc < conv, 0.0, shared)
            grad_conv = tl.where(conv < fc, 0.0, shared)
        else:
            grad_fc = grad * 0.5
            grad_conv = grad_fc
        grad_fc = _softmax_backward(grad_fc, fc)
        grad_conv = _softmax_backward(grad_conv, conv)
    tl.store(grad_fc_logits + offset, grad_fc, mask=inside)  # the store rounds to the logits' dtype
    tl.store(grad_conv_logits + offset, grad_conv, mask=inside)


def warps(block: int) -> int:
    """The warps of a program with a row of `block` classes: few, as a row is short and its sums cross warps."""
    return min(8, max(1, block // 256))


def serves(*logits: Tensor) -> bool:
    """Whether the kernels compute these logits `Tensor[..., C]`: not empty, not float64, and a row fits."""
    first = logits[0]
    return score_dtype(*logits) == torch.float32 and 0 < first.shape[-1] <= MAX_CLASSES and first.numel() > 0


def fuse_scores(fc_logits: Tensor, conv_logits: Tensor, method: str) -> Tensor:
    """Launches the forward kernel; arguments as in `reference.fuse_scores`."""
    if not serves(fc_logits, conv_logits):
        return reference.fuse_scores(fc_logits, conv_logits, method)
    rows, classes = fc_logits.shape
    block = next_power_of_2(classes)
    scores = torch.empty((rows, classes), dtype=torch.float32, device=fc_logits.device)
    _forward[(rows,)](
        fc_logits.contiguous(), conv_logits.contiguous(), scores, classes,
        METHOD=method, BLOCK=block, num_warps=warps(block),
    )  # fmt: skip
    return scores


def fuse_scores_backward(grad: Tensor, fc_logits: Tensor, conv_logits: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """Launches the backward kernel; arguments as in `reference.fuse_scores_backward`."""
    if not serves(fc_logits, conv_logits) or grad.dtype == torch.float64:
        return reference.fuse_scores_backward(grad, fc_logits, conv_logits, method)
    fc_logits, conv_logits = fc_logits.contiguous(), conv_logits.contiguous()
    rows, classes = fc_logits.shape
    block = next_power_of_2(classes)
    grads = torch.empty_like(fc_logits), torch.empty_like(conv_logits)
    _backward[(rows,)](
        grad.contiguous(), fc_logits, conv_logits, *grads, classes, METHOD=method, BLOCK=block, num_warps=warps(block)
    )
    return grads
