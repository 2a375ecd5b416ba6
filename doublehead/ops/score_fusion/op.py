"""Score fusion: the function, the operator, its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_choice, check_float, check_tensor
from .._dtypes import score_dtype
from .._library import (
    define,
    define_autocast,
    define_autograd,
    define_triton_kernel,
    native,
    one_thread_if_forked,
    warn_fallback,
    why_reference,
)
from . import reference
from .reference import FUSIONS


def fuse_scores(fc_logits: Tensor, conv_logits: Tensor, method: str = "complementary") -> Tensor:
    """One score per class from the logits of both heads.

    Each row's logits become probabilities by a softmax over the classes; they are joined by

        complementary   fc + conv * (1 - fc)    Equation 4; the classes of a row need not sum to one
        max             the larger; where both are equal, each gets half of the gradient
        average         (fc + conv) / 2
        none            fc; conv gets a gradient of zeros

    Everything is computed in float32 (in float64 if an input is), and stays finite for logits of any size.  A row with
    a NaN or +inf logit, or with nothing but -inf, has NaN for scores.

    Args:
        fc_logits: `Tensor[N, C]`, float16, bfloat16, float32 or float64.
        conv_logits: `Tensor[N, C]`, any of these dtypes.
        method: how to join, see above.

    Returns:
        `Tensor[N, C]`, float32 (float64 if an input is), in [0, 1] up to rounding.

    Raises:
        TypeError: not a tensor, or a dtype that is not accepted.
        ValueError: shapes do not fit, devices differ, or `method` is unknown.

    Source: Wu et al., Rethinking Classification and Localization for Object Detection (2020), Equation 4 and Table 3.
    """
    check_tensor("fc_logits", fc_logits, "a Tensor[N, C]")
    check_tensor("conv_logits", conv_logits, "a Tensor[N, C]")
    if fc_logits.dim() != 2:
        raise ValueError(f"fc_logits must have shape [N, C], got {list(fc_logits.shape)}")
    if conv_logits.shape != fc_logits.shape:
        raise ValueError(
            f"conv_logits must have the shape of fc_logits, {list(fc_logits.shape)}, got {list(conv_logits.shape)}"
        )
    check_float("fc_logits", fc_logits)
    check_float("conv_logits", conv_logits)
    if conv_logits.device != fc_logits.device:
        raise ValueError(f"conv_logits must be on the same device, {fc_logits.device}, got {conv_logits.device}")
    check_choice("method", method, FUSIONS)
    device = fc_logits.device.type
    if method == "none" or torch.compiler.is_compiling():
        return _fuse_scores(fc_logits, conv_logits, method)
    if torch.is_grad_enabled() and (fc_logits.requires_grad or conv_logits.requires_grad):
        # Plain PyTorch, which remembers both softmaxes; the operator's gradient, which computes them again, is slower.
        with one_thread_if_forked():
            return reference.fuse_scores(fc_logits, conv_logits, method)
    if native("fuse_scores", device):
        return _fuse_scores(fc_logits, conv_logits, method)
    if device == "cuda":
        warn_fallback("fuse_scores", why_reference("fuse_scores"))
    with one_thread_if_forked():
        return _without_kernel(fc_logits, conv_logits, method)


def _without_kernel(fc_logits: Tensor, conv_logits: Tensor, method: str) -> Tensor:
    """Plain PyTorch, in place."""
    dtype = score_dtype(fc_logits, conv_logits)
    fc, conv = (torch.softmax(logits, dim=-1, dtype=dtype) for logits in (fc_logits, conv_logits))
    if method == "complementary":
        return conv.mul_(1 - fc).add_(fc)
    return torch.maximum(fc, conv, out=fc) if method == "max" else fc.add_(conv).div_(2)


# ---------------------------------------------------------------------------------------------
# Registration


def _fake(fc_logits, conv_logits, method):
    return fc_logits.new_empty(fc_logits.shape, dtype=score_dtype(fc_logits, conv_logits))


def _fake_backward(grad, fc_logits, conv_logits, method):
    return fc_logits.new_empty(fc_logits.shape), conv_logits.new_empty(conv_logits.shape)


_fuse_scores = define(
    "fuse_scores(Tensor fc_logits, Tensor conv_logits, str method) -> Tensor",
    reference=reference.fuse_scores,
    fake=_fake,
)
_fuse_scores_backward = define(
    "fuse_scores_backward(Tensor grad, Tensor fc_logits, Tensor conv_logits, str method) -> (Tensor, Tensor)",
    reference=reference.fuse_scores_backward,
    fake=_fake_backward,
)


def _setup_context(ctx, inputs, output):
    *logits, ctx.method = inputs
    ctx.save_for_backward(*logits)


def _backward(ctx, grad):
    return *_fuse_scores_backward(grad, *ctx.saved_tensors, ctx.method), None


define_autograd("fuse_scores", _backward, _setup_context)
# Autocast changes nothing: the scores are computed in float32 anyway.
define_autocast("fuse_scores", lambda *arguments: _fuse_scores(*arguments))
define_autocast("fuse_scores_backward", lambda *arguments: _fuse_scores_backward(*arguments))
define_triton_kernel("fuse_scores", "doublehead.ops.score_fusion.kernel", "fuse_scores")
define_triton_kernel("fuse_scores_backward", "doublehead.ops.score_fusion.kernel", "fuse_scores_backward")
