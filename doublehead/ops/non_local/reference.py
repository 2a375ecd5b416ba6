"""The non-local block in plain PyTorch: the definition, for any device.

Source: Wang et al., Non-local Neural Networks (CVPR 2018), section 3, in the forms of Double-Head R-CNN.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from .._dtypes import accumulation_dtype
from .attention import Attention


def non_local_attention(qkv: Tensor, attention: Attention) -> Tensor:
    """O = P V with P = softmax(scale * Q K^T), or scale * Q K^T itself, for each RoI and group.

    The pairwise products are taken in float32 at least, as they can be large, and P is rounded to the dtype of `qkv`.

    Args:
        qkv: `Tensor[N, T, 3 * D]`: of each cell the query, the key, the value.
        attention: groups, softmax or none, scale.
    Returns:
        `Tensor[N, T, D]`.
    """
    query, key, value = qkv.chunk(3, dim=2)
    mixed = []
    for q, k, v in _groups(attention.groups, query, key, value):
        weights = _weights(q, k, attention).to(qkv.dtype)
        mixed.append(torch.bmm(weights, v))
    return mixed[0] if attention.groups == 1 else torch.cat(mixed, dim=2)


def non_local_attention_backward(grad: Tensor, qkv: Tensor, attention: Attention) -> Tensor:
    """Gradient of `qkv`; `grad`: `Tensor[N, T, D]`, that of the result.  P is computed anew.

    dV = P^T dO;  dP = dO V^T;  dS = P (dP - sum over keys of dP P), or dP;  dQ = scale * dS K;  dK = scale * dS^T Q.
    """
    query, key, value = qkv.chunk(3, dim=2)
    grads = []
    for g, q, k, v in _groups(attention.groups, grad, query, key, value):
        weights = _weights(q, k, attention)
        grad_logits = _products(g, v, attention.scale)
        if attention.softmax:
            grad_logits = weights * (grad_logits - (weights * grad_logits).sum(dim=2, keepdim=True))
        weights, grad_logits = weights.to(qkv.dtype), grad_logits.to(qkv.dtype)
        pairs = (grad_logits, k), (grad_logits.transpose(1, 2), q), (weights.transpose(1, 2), g)
        grads.append([torch.bmm(*pair) for pair in pairs])
    return torch.cat([grad for of_part in zip(*grads, strict=True) for grad in of_part], dim=2)


def _groups(groups: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Each group's part of the features of every `[N, T, D]`; no copies, which is why the groups go one by one."""
    return zip(*(tensor.chunk(groups, dim=2) for tensor in tensors), strict=True)


def _weights(query: Tensor, key: Tensor, attention: Attention) -> Tensor:
    products = _products(query, key, attention.scale)
    return products.softmax(dim=2) if attention.softmax else products


def _products(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`scale * a b^T` of every RoI, `[N, T, T]`, in float32 at least."""
    precise = accumulation_dtype(a.dtype)
    nothing = a.new_zeros((), dtype=precise)
    return torch.baddbmm(nothing, a.to(precise), b.to(precise).transpose(1, 2), beta=0, alpha=scale)


def non_local(x, qkv_weight, qkv_bias, out_weight, out_bias, *, pairwise="dot_product", groups=1, scale=False,
              relu=False, norm=None, training=False):  # fmt: skip
    """y = x + BN(W attention(x)), with a ReLU if asked for: the arguments and the result of `doublehead.ops.non_local`.

    One convolution after the other.  Does not update the running statistics.
    """
    number, _, height, width = x.shape

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight[:, :, None, None], bias)

    def cells(x: Tensor) -> Tensor:  # [N, D, H, W] -> [N, groups, H * W, D / groups]
        return x.reshape(number, groups, -1, height * width).transpose(2, 3)

    biases = (None, None, None) if qkv_bias is None else qkv_bias.chunk(3)
    query, key, value = (
        cells(convolve(x, weight, bias)) for weight, bias in zip(qkv_weight.chunk(3), biases, strict=True)
    )
    products = query @ key.transpose(2, 3)
    if pairwise == "dot_product":
        weights = products / (height * width)
    else:
        weights = torch.softmax(products / query.shape[3] ** 0.5 if scale else products, dim=3)
    mixed = (weights @ value).transpose(2, 3).reshape(number, -1, height, width)
    y = convolve(mixed, out_weight, out_bias)
    if norm is not None:
        statistics = (None, None) if training else (norm.running_mean, norm.running_var)
        y = F.batch_norm(y, *statistics, norm.weight, norm.bias, training=training, eps=norm.eps)
    return (x + y).relu() if relu else x + y
