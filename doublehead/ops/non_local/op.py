"""The non-local block as a function, and its attention as an operator with a gradient."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .._checks import check_choice, check_shape, check_tensor
from .._dtypes import accumulation_dtype, layer_dtype
from .._library import define, define_autocast, define_autograd, define_triton_kernel
from ..batch_norm.layer import Norm, Statistics
from ..batch_norm.op import Batch, track_statistics
from ..fused_conv.op import fused_conv
from . import cpu, reference
from .attention import Attention, attention_of
from .training import Projections, serves, train

PAIRWISE = ("dot_product", "embedded_gaussian")


class BatchNorm(NamedTuple):
    """A batch norm over C channels; each tensor is a `Tensor[C]`."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    """None together with `running_var`: the statistics of the batch are used at inference too."""
    running_var: Tensor | None
    eps: float = 1e-5
    momentum: float = 0.1
    """The batch's share in the updated running statistics."""

    def batch(self, statistics: Statistics, rows: int) -> Batch:
        """What updates the running statistics after a batch of so many rows."""
        return Batch(*statistics, self.running_mean, self.running_var, rows, self.momentum, self.eps)


def non_local(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    *,
    pairwise: Literal["dot_product", "embedded_gaussian"] = "dot_product",
    groups: int = 1,
    scale: bool = False,
    relu: bool = False,
    norm: BatchNorm | None = None,
    training: bool = False,
) -> Tensor:
    """Non-local block: y = x + BN(W_out attention(x) + b_out), the attention among the cells of each map.

    The D features of each cell's query, key and value fall into `groups` independent parts of d = D / groups:

        dot_product           attention = Q K^T V / (H W)
        embedded_gaussian     attention = softmax(Q K^T) V; with `scale`, softmax(Q K^T / sqrt(d)) V

    The pairwise products are kept in float32 at least, also for 16-bit input, as they can be large.  Queries, keys and
    values are one matrix product.  At inference the batch norm is folded into the last one.  On CUDA a Triton kernel
    takes the attention of maps of up to 256 cells where d is a multiple of 16 up to 512 (not of float64); all else is
    plain PyTorch.  Its gradient is deterministic.  Under autocast the matrix products and the attention run in the
    autocast dtype.  `torch.compile` compiles `dot_product` anew for each map size, which is in the operator's scale.

    In float32 on CUDA the projections follow PyTorch's switch for convolutions, `torch.backends.cudnn.conv
    .fp32_precision` (TF32 unless changed), and the attention that for matrix products, `torch.backends.cuda.matmul
    .fp32_precision` (exact unless changed): as the layers do that the block stands for.

    Args:
        x: `Tensor[N, C, H, W]`, floating point.  In channels-last memory format it is used as it is, else copied.
        qkv_weight: `Tensor[3 * D, C]`, of queries, then keys, then values; `qkv_bias`: `Tensor[3 * D]` or None.
        out_weight: `Tensor[C, D]`; `out_bias`: `Tensor[C]` or None.
        pairwise: see above.
        groups: must divide D.
        scale: see above; no effect on `dot_product`.
        relu: after the residual.
        norm: the batch norm, or None.  In training its running statistics are updated in place, unbiased as those of
            `torch.nn.BatchNorm2d`.
        training: `norm` takes the statistics of the batch.

    Returns:
        `Tensor[N, C, H, W]`, channels-last, in the dtype of `x`.

    Raises:
        TypeError: not a tensor, or x is not floating point.
        ValueError: a shape does not fit, or an option is not accepted.

    Source: Wang et al., Non-local Neural Networks (CVPR 2018), equations 1-6.
    """
    _check(x, qkv_weight, qkv_bias, out_weight, out_bias, pairwise, groups)
    number, channels, height, width = x.shape
    attention = attention_of(pairwise, groups, scale, cells=height * width, inner=out_weight.shape[1])
    folds = norm is None or (not training and norm.running_mean is not None)
    weight, bias = fold_out(norm, out_weight, out_bias) if norm is not None and folds else (out_weight, out_bias)
    if folds and cpu.serves(x, qkv_weight, qkv_bias, weight, bias):
        return cpu.non_local(x, qkv_weight, qkv_bias, weight, bias, attention, relu)
    rows = x.permute(0, 2, 3, 1).reshape(-1, channels)
    if not folds and norm.weight is not None and norm.bias is not None and serves(x):
        qkv_biases = [] if qkv_bias is None else [qkv_bias]
        weights = Projections([qkv_weight[:, :, None, None]], qkv_biases, out_weight[:, :, None, None], out_bias)
        y, found = train(rows, (height, width), weights, Norm(norm.weight, norm.bias, norm.eps), attention, relu)
        if norm.running_mean is not None:
            track_statistics([norm.batch(found, len(rows))])
        return y.view(number, height, width, channels).permute(0, 3, 1, 2)
    mixed = mix(rows.view(number, height * width, channels), qkv_weight, qkv_bias, attention)
    if folds:
        y = _project_and_add(rows, mixed, weight, bias, relu)
        return y.view(number, height, width, channels).permute(0, 3, 1, 2)
    y = _normalize_and_add(rows, project(mixed, out_weight, out_bias).flatten(0, 1), norm, relu)
    return y.view(number, height, width, channels).permute(0, 3, 1, 2)


def mix(cells: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None, attention: Attention) -> Tensor:
    """The attention of `non_local`, without what follows it: `Tensor[N, T, C]` -> `Tensor[N, T, D]`."""
    return _op(project(cells, qkv_weight, qkv_bias), *attention)


def project(cells: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1x1 convolution over cells: `Tensor[N, T, C]` and `Tensor[D, C]` -> `Tensor[N, T, D]`.

    A matrix product; but in float32 on CUDA it is left a convolution, as PyTorch lets the user choose the precision of
    the two apart, and by default takes TF32 for convolutions alone.
    """
    if cells.device.type != "cuda" or layer_dtype(cells) != torch.float32:
        return F.linear(cells, weight, bias)
    number, length, channels = cells.shape
    maps = cells.reshape(number, length, 1, channels).permute(0, 3, 1, 2)  # of T x 1 cells, channels-last
    return F.conv2d(maps, weight[:, :, None, None], bias).permute(0, 2, 3, 1).reshape(number, length, len(weight))


def fold_out(norm: BatchNorm, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of the projection with the batch norm of inference in them, in float32 at least."""
    precise = accumulation_dtype(weight.dtype)
    factor = (norm.running_var.to(precise) + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight
    shift = -norm.running_mean * factor if bias is None else (bias - norm.running_mean) * factor
    return weight * factor[:, None], shift if norm.bias is None else shift + norm.bias


def _project_and_add(residual: Tensor, mixed: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """`relu(residual + mixed W^T + bias)`: rows `Tensor[N * T, C]` and `Tensor[N, T, D]` -> `Tensor[N * T, C]`."""
    weight, bias = weight.to(mixed.dtype), None if bias is None else bias.to(mixed.dtype)
    tensors = (residual, mixed, weight) if bias is None else (residual, mixed, weight, bias)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if residual.dtype != mixed.dtype:  # autocast of a float32 x: the residual keeps its precision
        y = residual + project(mixed, weight, bias).flatten(0, 1)
    elif not needs_grad:
        return fused_conv(mixed.flatten(0, 1), weight, bias, size=(1, 1), residual=residual, relu=relu)
    elif mixed.device.type == "cuda" and mixed.dtype == torch.float32:
        y = residual + project(mixed, weight, bias).flatten(0, 1)
    else:
        y = torch.addmm(residual, mixed.flatten(0, 1), weight.t())
        y = y if bias is None else y + bias
    return y.relu() if relu else y


def _normalize_and_add(residual: Tensor, projected: Tensor, norm: BatchNorm, relu: bool) -> Tensor:
    """`relu(residual + BN(projected))` with the statistics of the batch, over rows: `Tensor[M, C]`."""
    maps = projected[None, :, None].permute(0, 3, 1, 2)  # of M x 1 cells, channels-last
    y = F.batch_norm(maps, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, norm.momentum, norm.eps)
    y = residual + y[0, :, :, 0].t()
    return y.relu_() if relu else y


# ---------------------------------------------------------------------------------------------
# Argument checks


def _check(x, qkv_weight, qkv_bias, out_weight, out_bias, pairwise, groups) -> None:
    for name, tensor in (("x", x), ("qkv_weight", qkv_weight), ("out_weight", out_weight)):
        check_tensor(name, tensor, "a tensor")
    if x.dim() != 4:
        raise ValueError(f"x must have shape [N, C, H, W], got {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    check_choice("pairwise", pairwise, PAIRWISE)
    channels, inner = x.shape[1], qkv_weight.shape[0] // 3
    check_shape("qkv_weight", qkv_weight, (3 * inner, channels), "[3 * D, C]")
    check_shape("out_weight", out_weight, (channels, inner), "[C, D]")
    if qkv_bias is not None:
        check_shape("qkv_bias", qkv_bias, (3 * inner,), "[3 * D]")
    if out_bias is not None:
        check_shape("out_bias", out_bias, (channels,), "[C]")
    if groups < 1 or inner % groups:
        raise ValueError(f"groups must be at least 1 and divide D = {inner}, got {groups}")


# ---------------------------------------------------------------------------------------------
# Registration


def _fake(qkv, attention):
    return qkv.new_empty((qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3))


def _fake_backward(grad, qkv, attention):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


_ATTENTION = "int groups, bool softmax, float scale"
_op = define(
    f"non_local_attention(Tensor qkv, {_ATTENTION}) -> Tensor",
    reference=reference.non_local_attention,
    fake=_fake,
    pack=lambda qkv, *attention: (qkv, Attention(*attention)),
)
_op_backward = define(
    f"non_local_attention_backward(Tensor grad, Tensor qkv, {_ATTENTION}) -> Tensor",
    reference=reference.non_local_attention_backward,
    fake=_fake_backward,
    pack=lambda grad, qkv, *attention: (grad, qkv, Attention(*attention)),
)


def _setup_context(ctx, inputs, output):
    qkv, *ctx.attention = inputs
    ctx.save_for_backward(qkv)


def _backward(ctx, grad):
    (qkv,) = ctx.saved_tensors
    return _op_backward(grad, qkv, *ctx.attention), None, None, None


def _second_backward(ctx, grad):
    raise RuntimeError("non_local: the gradient of its gradient is not defined")


def _autocast(qkv, *attention):
    """In the autocast dtype, as a matrix product is; float64 stays."""
    dtype = qkv.dtype if qkv.dtype == torch.float64 else torch.get_autocast_dtype(qkv.device.type)
    return _op(qkv.to(dtype), *attention)


define_autograd("non_local_attention", _backward, _setup_context)
define_autograd("non_local_attention_backward", _second_backward, lambda ctx, inputs, output: None)
define_autocast("non_local_attention", _autocast)
for _name in ("non_local_attention", "non_local_attention_backward"):
    define_triton_kernel(_name, "doublehead.ops.non_local.kernel", _name)
