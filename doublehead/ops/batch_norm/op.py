"""Batch normalisation with residual and ReLU: the functions, the operators, their gradient."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import check_shape, check_tensor
from .._dtypes import accumulation_dtype
from .._library import define, define_autocast, define_autograd, define_cpu_kernel, define_triton_kernel
from . import reference
from .arguments import ApplyArguments, BackwardArguments, ForwardArguments


def batch_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    relu: bool = True,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalises by the statistics of this batch, adds the residual, and takes ReLU, all in one.

    y = act((x - mean) * invstd * weight + bias + residual).  Maps are given as rows: `Tensor[N * H * W, C]`, which a
    channels-last `Tensor[N, C, H, W]` is without a copy.  The statistics are accumulated in float32 by a rule that does
    not lose small variances beside large means, in a fixed order.  Saved for the backward: x, y and the statistics.

    Args:
        x: `Tensor[M, C]`, float16, bfloat16, float32 or float64.
        weight: `Tensor[C]`, floating point, usually float32.
        bias: `Tensor[C]`, likewise.
        residual: `Tensor[M, C]` in the dtype of x, or None.
        relu: take ReLU at the end.
        eps: added to the variance.

    Returns:
        y: `Tensor[M, C]` in the dtype of x.
        mean: `Tensor[C]`, float32 (float64 for float64), without gradient.
        invstd: likewise, 1 / sqrt(variance + eps) of the biased variance.

    Raises:
        TypeError: not a tensor, or a dtype that is not accepted.
        ValueError: shapes do not fit, or M or C is 0.

    Source: Ioffe and Szegedy, Batch Normalization (2015), algorithm 1.
    """
    _check(x, weight, bias, residual)
    return _forward(x, weight, bias, residual, relu, eps)


def batch_norm_act_apply(
    x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool
) -> Tensor:
    """`batch_norm_act` with given statistics and without gradient, for a backward pass that recomputes the result.

    Arguments and errors are those of `batch_norm_act`; returns `Tensor[M, C]`.
    """
    _check(x, weight, bias, residual)
    return _apply(x, mean, invstd, weight, bias, residual, relu)


def batch_norm_act_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient of `batch_norm_act`, for code that keeps its own record of what was saved.

    Args:
        grad: `Tensor[M, C]`, of y.
        x, mean, invstd, weight, eps: as in the forward.
        y: the result, if it went through ReLU; else None.
        residual: whether the residual's gradient is wanted: it costs a pass over memory.

    Returns:
        gradients of x `Tensor[M, C]`, weight and bias `Tensor[C]` (in the dtype of the statistics), and of the residual
        `Tensor[M, C]`: grad where y > 0; without `residual` an empty tensor.
    """
    return _backward(grad, x, y, mean, invstd, weight, eps, residual)


class Batch(NamedTuple):
    """The statistics of a batch norm's batch, and the running ones that follow them."""

    mean: Tensor
    """`Tensor[C]`, of `batch_norm_act`, and so is invstd."""
    invstd: Tensor
    running_mean: Tensor
    """`Tensor[C]`, written to, as is running_var."""
    running_var: Tensor
    rows: int
    """The rows of the batch."""
    momentum: float
    """The batch's share."""
    eps: float
    """Added to the variance in `invstd`."""


@torch.no_grad()
def track_statistics(batches: Sequence[Batch]) -> None:
    """Moves running statistics towards a batch's in place, as `torch.nn.BatchNorm2d` does, with the unbiased variance.

    All norms alike are updated together: a dozen operators in all, and not six for each.  One that has seen several
    batches is updated once after the other: a GPU writes to all tensors of a list at the same time.
    """
    groups: dict[tuple, list[Batch]] = {}
    times: Counter[int] = Counter()
    for batch in batches:
        times[id(batch.running_mean)] += 1
        time = times[id(batch.running_mean)]
        dtypes = batch.running_mean.dtype, batch.mean.dtype
        kind = time, batch.rows, batch.momentum, batch.eps, *dtypes, batch.mean.device
        groups.setdefault(kind, []).append(batch)
    for (_time, rows, momentum, eps, dtype, *_), group in groups.items():
        invstd = torch.cat([batch.invstd for batch in group])
        variance = ((invstd.double() ** -2 - eps).clamp_(min=0) * (rows / max(rows - 1, 1))).to(dtype)
        running = [batch.running_mean for batch in group] + [batch.running_var for batch in group]
        new = [batch.mean.to(dtype) for batch in group]
        new += variance.split([len(batch.mean) for batch in group])
        torch._foreach_lerp_(running, new, momentum)


def check_rows(x: Tensor) -> None:
    """Raises a ValueError unless x is a `Tensor[M, C]` that has statistics."""
    if x.dim() != 2 or 0 in x.shape:
        raise ValueError(f"x must have shape [M, C] with M, C > 0, got {list(x.shape)}")


def _check(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> None:
    check_tensor("x", x, "a Tensor[M, C]")
    check_rows(x)
    if not x.is_floating_point():
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        check_tensor(name, tensor, "a Tensor[C]")
        check_shape(name, tensor, x.shape[1:], "[C]")
    if residual is not None:
        check_tensor("residual", residual, "a Tensor[M, C] or None")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual must be like x, {list(x.shape)} {x.dtype}, got {list(residual.shape)} {residual.dtype}"
        )


# ---------------------------------------------------------------------------------------------
# Registration


def _statistics_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=accumulation_dtype(x.dtype))


def _fake(args: ForwardArguments) -> tuple[Tensor, Tensor, Tensor]:
    return args.x.new_empty(args.x.shape), _statistics_like(args.x), _statistics_like(args.x)


def _fake_backward(args: BackwardArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = args.x
    grad_residual = x.new_empty(x.shape if args.residual else (0,))
    return x.new_empty(x.shape), _statistics_like(x), _statistics_like(x), grad_residual


_forward = define(
    "batch_norm_act(Tensor x, Tensor weight, Tensor bias, Tensor? residual, bool relu, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    reference=reference.batch_norm_act,
    fake=_fake,
    pack=lambda *arguments: (ForwardArguments(*arguments),),
)
_apply = define(
    "batch_norm_act_apply(Tensor x, Tensor mean, Tensor invstd, Tensor weight, Tensor bias, Tensor? residual, "
    "bool relu) -> Tensor",
    reference=reference.batch_norm_act_apply,
    fake=lambda args: args.x.new_empty(args.x.shape),
    pack=lambda *arguments: (ApplyArguments(*arguments),),
)
_backward = define(
    "batch_norm_act_backward(Tensor grad, Tensor x, Tensor? y, Tensor mean, Tensor invstd, Tensor weight, float eps, "
    "bool residual=True) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.batch_norm_act_backward,
    fake=_fake_backward,
    pack=lambda *arguments: (BackwardArguments(*arguments),),
)


def _setup_context(ctx, inputs, output):
    x, weight, _, residual, relu, ctx.eps = inputs
    y, mean, invstd = output
    ctx.has_residual = residual is not None
    ctx.save_for_backward(x, y if relu else None, mean, invstd, weight)
    ctx.mark_non_differentiable(mean, invstd)
    ctx.set_materialize_grads(False)


def _gradient(ctx, grad, *_):
    if grad is None:
        return None, None, None, None, None, None
    x, y, mean, invstd, weight = ctx.saved_tensors
    grad_x, grad_weight, grad_bias, grad_residual = _backward(
        grad, x, y, mean, invstd, weight, ctx.eps, ctx.has_residual
    )
    grad_weight, grad_bias = grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)
    return grad_x, grad_weight, grad_bias, grad_residual if ctx.has_residual else None, None, None


define_autograd("batch_norm_act", _gradient, _setup_context)
define_autocast("batch_norm_act", _forward)  # any dtype will do: the computation is float32 inside


# ---------------------------------------------------------------------------------------------
# CPU: ATen's own kernels, which are as fast as memory.  They take maps: rows are a map of M x 1 cells, channels-last.


def _as_map(rows: Tensor) -> Tensor:
    return rows.contiguous()[None, :, None].permute(0, 3, 1, 2)


def _as_rows(maps: Tensor) -> Tensor:
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def _finish(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    if residual is not None:
        y.add_(residual)
    return y.relu_() if relu else y


def _cpu(args: ForwardArguments):
    weight, bias = (parameter.to(_statistics_like(args.x).dtype) for parameter in (args.weight, args.bias))
    y, mean, invstd = torch.native_batch_norm(_as_map(args.x), weight, bias, None, None, True, 0.0, args.eps)
    return _finish(_as_rows(y), args.residual, args.relu), mean, invstd


def _cpu_apply(args: ApplyArguments):
    scale = args.invstd * args.weight
    shift = args.bias - args.mean * scale
    y = torch.addcmul(shift, args.x.to(scale.dtype), scale)
    return _finish(y, args.residual, args.relu).to(args.x.dtype)


def _cpu_backward(args: BackwardArguments):
    grad = args.grad.contiguous()
    if args.y is not None:
        grad = torch.ops.aten.threshold_backward(grad, args.y, 0)
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
        _as_map(grad), _as_map(args.x), args.weight.to(args.mean.dtype), None, None, args.mean, args.invstd, True,
        args.eps, [True, True, True],
    )  # fmt: skip
    if not args.residual:
        return _as_rows(grad_x), grad_weight, grad_bias, args.x.new_empty(0)
    return _as_rows(grad_x), grad_weight, grad_bias, grad.clone() if args.y is None else grad


define_cpu_kernel("batch_norm_act", _cpu)
define_cpu_kernel("batch_norm_act_apply", _cpu_apply)
define_cpu_kernel("batch_norm_act_backward", _cpu_backward)
for _name in ("batch_norm_act", "batch_norm_act_apply", "batch_norm_act_backward"):
    define_triton_kernel(_name, "doublehead.ops.batch_norm.kernel", _name)
