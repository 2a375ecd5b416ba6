"""Non-local block (Wang et al., CVPR 2018) in the forms that Double-Head uses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import NonLocalConfig


class NonLocalBlock(nn.Module):
    """y = x + BN(W(attention(theta(x), phi(x)) g(x))), over the cells of each RoI's map.

    `dot_product` divides the pairwise products by the number of cells; `embedded_gaussian`
    takes their softmax.  The inner width is half the outer, in `groups` independent groups.  W's
    weight and bias start at zero, so a fresh block adds nothing to x.

    Args:
        channels: width of input and output.
        config: pairwise function, groups, scale, ReLU after the residual.

    Raises:
        ValueError: the inner width does not divide into the groups.
    """

    def __init__(self, channels: int, config: NonLocalConfig) -> None:
        super().__init__()
        inner = channels // 2
        if channels % 2 or inner % config.groups:
            raise ValueError(f"head.non_local.groups: {config.groups} groups do not divide half of {channels} channels")
        self.config = config
        self.theta = nn.Conv2d(channels, inner, 1)
        self.phi = nn.Conv2d(channels, inner, 1)
        self.g = nn.Conv2d(channels, inner, 1)
        self.out = nn.Conv2d(inner, channels, 1)
        self.norm = nn.BatchNorm2d(channels)
        for layer in (self.theta, self.phi, self.g):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def attention(self, size):
        soft = self.config.pairwise != "dot_product"
        d = self.theta.out_channels // self.config.groups
        scale = (d**-0.5 if self.config.scale else 1.0) if soft else 1 / (size[0] * size[1])
        return {"groups": self.config.groups, "softmax": soft, "scale": scale, "relu": self.config.relu_after}

    def fold(self):
        from ..ops.conv_head import Block
        from .folding import fold_norm

        weight, bias = fold_norm(self.out, self.norm)
        scale = torch.rsqrt(self.norm.running_var + self.norm.eps) * self.norm.weight
        bias = bias + self.out.bias * scale
        qkv = (self.theta, self.phi, self.g)
        weights = [torch.cat([c.weight for c in qkv]).flatten(1), torch.cat([c.bias for c in qkv])]
        return Block.NON_LOCAL, [*weights, weight.flatten(1), bias]

    def forward(self, x: Tensor) -> Tensor:
        """`Tensor[N, channels, H, W]` -> the same shape."""
        query, key, value = (self._cells(layer(x)) for layer in (self.theta, self.phi, self.g))
        mixed = self._attention(query, key) @ value  # [N, groups, H*W, inner / groups]
        mixed = mixed.transpose(2, 3).reshape(x.shape[0], -1, *x.shape[2:])
        y = x + self.norm(self.out(mixed))
        return y.relu() if self.config.relu_after else y

    def _cells(self, x: Tensor) -> Tensor:
        """`[N, C, H, W]` -> `[N, groups, H*W, C / groups]`."""
        return x.flatten(2).unflatten(1, (self.config.groups, -1)).transpose(2, 3)

    def _attention(self, query: Tensor, key: Tensor) -> Tensor:
        if self.config.pairwise == "dot_product":
            return query @ key.transpose(2, 3) / query.shape[2]
        if self.config.scale:
            query = query * query.shape[3] ** -0.5
        # The logits can be large: the softmax is taken in fp32 at least.
        precise = torch.promote_types(query.dtype, torch.float32)
        return torch.softmax(query @ key.transpose(2, 3), dim=-1, dtype=precise).to(query.dtype)
