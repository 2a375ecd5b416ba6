"""The conv-head's tower: residual and non-local blocks, then the average over cells (PAPER Figure 5, Table 2).

Plain modules define it. `ConvTower` runs them in one of four ways, with the same results:

- inference: batch norms folded, all blocks in one operator (`doublehead.ops.conv_head`);
- inference on a CPU after `quantized.use_int8`: layer by layer, with integers in between (`layered`); results differ;
- training: blocks with fused batch norm, ReLU and residual, which remember less (`conv_training`);
- plain: module by module. For everything else: gradients in eval mode, synchronised or frozen batch norms, training
  under torch.compile (which fuses by itself), or `fused=False`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..config import HeadConfig, NonLocalConfig
from ..ops import NonLocalBlock
from ..ops._folded import inner_modules
from ..ops.batch_norm.layer import Statistics
from ..ops.batch_norm.op import Batch, track_statistics
from ..ops.conv_head import Block, conv_head
from . import conv_training as training
from .folding import (
    FoldedWeights,
    fold_norm,
    has_inner_hooks,
    have_kinds,
    is_like,
    layer_dtype,
    needs_grad,
    show_what_is_not_finite,
)
from .layered import Layered, run_conv
from .products import Layer

Normed = tuple[nn.BatchNorm2d, Statistics]
"""A batch norm, and the statistics of the batch that it has seen."""


class ResidualBlock(nn.Module):
    """What the two kinds of residual block share: their layers in training."""

    def layers(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        """Convolutions with their norms, in the order of `conv_training`."""
        raise NotImplementedError

    def is_original(self) -> bool:
        """Whether its layers are those it was made of, which is what fused paths compute."""
        raise NotImplementedError

    def train_rows(self, x: Tensor, size: Sequence[int], recompute: bool) -> tuple[Tensor, list[Normed]]:
        """As `forward`, on rows `Tensor[N * H * W, C]`, remembering less; with `recompute` only the input.

        Also returns each norm with the statistics of its batch: running ones are left to the caller.
        """
        layers = self.layers()
        weights = [training.ConvNorm(conv.weight, norm.weight, norm.bias, norm.eps) for conv, norm in layers]
        y, statistics = self._train_function()(x, weights, size, recompute)
        return y, [(norm, found) for (_, norm), found in zip(layers, statistics, strict=True)]

    def _train_function(self) -> Callable:
        raise NotImplementedError


class WideningBlock(ResidualBlock):
    """The first residual block: 3x3 and 1x1 convolutions beside a 1x1 shortcut, to more channels.

    Args:
        channels: input width.
        dim: output width.
        shortcut_relu: ReLU after the shortcut too.
    """

    def __init__(self, channels: int, dim: int, shortcut_relu: bool = False) -> None:
        super().__init__()
        self.residual = nn.Sequential(*conv_norm(channels, channels, 3), nn.ReLU(), *conv_norm(channels, dim, 1))
        self.shortcut = nn.Sequential(*conv_norm(channels, dim, 1), *([nn.ReLU()] if shortcut_relu else []))
        self.shortcut_relu = shortcut_relu

    def forward(self, x: Tensor) -> Tensor:
        return (self.residual(x) + self.shortcut(x)).relu()

    def layers(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        conv3, norm3, _, conv1, norm1 = self.residual
        return [(conv3, norm3), (conv1, norm1), (self.shortcut[0], self.shortcut[1])]

    def is_original(self) -> bool:
        return is_like(self.residual, "cnrcn") and is_like(self.shortcut, "cnr" if self.shortcut_relu else "cn")

    def fold(self) -> tuple[Block, list[Tensor]]:
        """Kind and folded weights for `conv_head`."""
        (weight3, bias3), (weight1, bias1), (short, short_bias) = (fold_norm(*layer) for layer in self.layers())
        weight1, short = weight1.flatten(1), short.flatten(1)
        if self.shortcut_relu:
            return Block.WIDENING_SHORTCUT_RELU, [weight3, bias3, weight1, bias1, short, short_bias]
        return Block.WIDENING, [weight3, bias3, torch.cat((weight1, short), dim=1), bias1 + short_bias]

    def _train_function(self) -> Callable:
        return partial(training.widening, shortcut_relu=self.shortcut_relu)


class Bottleneck(ResidualBlock):
    """Residual bottleneck: 1x1 to a quarter of the channels, 3x3, 1x1 back (He et al. 2016)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = channels // 4
        self.residual = nn.Sequential(
            *conv_norm(channels, inner, 1), nn.ReLU(),
            *conv_norm(inner, inner, 3), nn.ReLU(),
            *conv_norm(inner, channels, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.residual(x)).relu()

    def layers(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        conv1, norm1, _, conv3, norm3, _, conv2, norm2 = self.residual
        return [(conv1, norm1), (conv3, norm3), (conv2, norm2)]

    def is_original(self) -> bool:
        return is_like(self.residual, "cnrcnrcn")

    def fold(self) -> tuple[Block, list[Tensor]]:
        """Kind and folded weights for `conv_head`."""
        (weight1, bias1), (weight3, bias3), (weight2, bias2) = (fold_norm(*layer) for layer in self.layers())
        return Block.BOTTLENECK, [weight1.flatten(1), bias1, weight3, bias3, weight2.flatten(1), bias2]

    def _train_function(self) -> Callable:
        return training.bottleneck


class ConvTower(nn.Sequential):
    """K blocks and average pooling: `Tensor[N, C, S, S]` -> `Tensor[N, dim]`.

    With non-local blocks, K counts them too: one before each bottleneck.

    A training step waits for nothing, so CUDA graphs can record it where the number of RoIs stays the same:
    `torch.cuda.make_graphed_callables(tower, (maps,))`, under autocast with `cache_enabled=False`.  Recording runs some
    steps, which move the running statistics; load the state again after it.

    Args:
        channels: input width.
        config: depth, width, non-local blocks, and whether to run fused.

    Raises:
        ValueError: K under 1, or an even K with non-local blocks.
    """

    layered: Layered | None = None
    """How layers run that have a precision of their own; None: all blocks are one operator."""

    def __init__(self, channels: int, config: HeadConfig) -> None:
        blocks, non_local = config.conv_blocks, config.non_local
        if blocks < 1:
            raise ValueError(f"head.conv_blocks: expected at least 1, got {blocks}")
        if non_local.enabled and blocks % 2 == 0:
            raise ValueError(f"head.conv_blocks: expected an odd number with non-local blocks, got {blocks}")
        layers: list[nn.Module] = [WideningBlock(channels, config.conv_dim, config.shortcut_relu)]
        for _ in range((blocks - 1) // 2 if non_local.enabled else blocks - 1):
            if non_local.enabled:
                layers.append(non_local_block(config.conv_dim, non_local))
            layers.append(Bottleneck(config.conv_dim))
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.recompute = config.recompute
        self._folded = FoldedWeights()
        self.fused = config.fused

    @property
    def fused(self) -> bool:
        """Whether the fused operators may run; False: every layer as a module of its own."""
        return self._fused

    @fused.setter
    def fused(self, fused: bool) -> None:
        self._fused = fused
        for block in self.blocks:
            if isinstance(block, NonLocalBlock):
                block.fused = fused

    @property
    def blocks(self) -> list[nn.Module]:
        """Residual and non-local blocks, in order."""
        return list(self)[:-2]

    def forward(self, x: Tensor, count: Tensor | None = None) -> Tensor:
        """`count`: `Tensor[]` int64: only the first `count` RoIs matter, the rest may hold anything.  None: all."""
        if self.can_skip(x):
            return self._infer(x, count)
        if self.trains_fused():
            return self._train(x)
        return super().forward(x)

    def train(self, mode: bool = True) -> ConvTower:
        self._folded.forget()
        if self.layered is not None:
            self.layered.forget()
        return super().train(mode)

    def layers(self) -> list[Layer]:
        """The layers that can have a precision of their own, in order; none where a block is of another type."""
        known = WideningBlock, Bottleneck, NonLocalBlock
        if any(type(block) not in known for block in self.blocks):
            return []
        layers, signed = [], True
        for index, block in enumerate(self.blocks):
            layers += layers_of(index, block, signed)
            signed = isinstance(block, NonLocalBlock) and not block.relu_after
        return layers

    def can_skip(self, x: Tensor) -> bool:
        """Whether `x` goes through the folded operator, which leaves out RoIs: inference, no gradients, no hooks."""
        if not self.fused or self.training or not self._is_original() or has_inner_hooks(self):
            return False
        return not needs_grad(self, x)

    def plain(self) -> ConvTower:
        """Run every layer as a module of its own from now on; returns the tower."""
        self.fused = False
        return self

    def held_tensors(self) -> list[Tensor]:
        """The folded weights, and those of the non-local blocks where these run by themselves."""
        inner = (block.held_tensors() for block in self.blocks if isinstance(block, NonLocalBlock))
        return [*self._folded.tensors(), *(tensor for tensors in inner for tensor in tensors)]

    def trains_fused(self) -> bool:
        if not self.fused or torch.compiler.is_compiling() or has_inner_hooks(self):
            return False
        norms = self._norms()
        for norm in norms:
            if not norm.training or norm.momentum is None:
                return False
        return self._is_original(norms)

    def _is_original(self, norms: list[nn.Module] | None = None) -> bool:
        """Whether nobody has replaced a layer by one that the fused paths would not compute."""
        (*blocks, mean, flatten), known = self, (WideningBlock, Bottleneck, NonLocalBlock)
        if not have_kinds((mean, flatten), "af") or not isinstance(blocks[0], WideningBlock):
            return False
        norms = self._norms() if norms is None else norms
        return _are_plain(norms) and all(type(b) in known and b.is_original() for b in blocks)

    def _norms(self) -> list[nn.Module]:
        return [module for module in inner_modules(self) if isinstance(module, nn.modules.batchnorm._BatchNorm)]

    def _infer(self, x: Tensor, count: Tensor | None) -> Tensor:
        dtype = layer_dtype(x)
        if self.layered is not None and self.layered.runs(x):
            if products := self.layered.products(self, self.layers(), dtype):
                return run_conv(self.blocks, x, products, count)
        tensors = [*self.parameters(), *self.buffers()]
        if torch.compiler.is_compiling():  # part of the graph; torch 2.11 does not trace the lambda below
            kinds, folded = self._fold(dtype)
        else:
            kinds, folded = self._folded.get(tensors, dtype, lambda: self._fold(dtype))
        x = x.to(dtype, memory_format=torch.channels_last)
        non_local = next((block for block in self.blocks if isinstance(block, NonLocalBlock)), None)
        if non_local is None:
            return conv_head(x, folded, kinds, count)
        groups, softmax, scale = non_local.attention(x.shape[2] * x.shape[3])
        return conv_head(
            x, folded, kinds, count, groups=groups, softmax=softmax, scale=scale, relu=non_local.relu_after
        )

    def _fold(self, dtype: torch.dtype) -> tuple[list[Block], list[Tensor]]:
        kinds, folded = [], []
        for block in self.blocks:
            kind, tensors = fold_non_local(block) if isinstance(block, NonLocalBlock) else block.fold()
            kinds.append(kind)
            folded += [
                tensor.to(dtype).contiguous(
                    memory_format=torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
                )
                for tensor in tensors
            ]
        return kinds, show_what_is_not_finite(folded)

    def _train(self, x: Tensor) -> Tensor:
        dtype, (number, _, *size) = layer_dtype(x), x.shape
        rows = x.to(dtype).permute(0, 2, 3, 1).reshape(-1, x.shape[1])  # a view of channels-last maps
        normed: list[Normed] = []
        for block in self.blocks:
            if isinstance(block, ResidualBlock):
                rows, found = block.train_rows(rows, size, self.recompute)
                normed += found
            elif block.fused and block.norm is not None:  # `trains_fused` has seen the rest
                rows, found = block.train_rows(rows, size)
                normed.append((block.norm, found))
            else:
                rows = block(rows.view(number, *size, -1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(0, 2)
        track(normed, len(rows))
        return rows.view(number, size[0] * size[1], -1).mean(1)


def _are_plain(norms: Sequence[nn.Module]) -> bool:
    """Not SyncBatchNorm, and with the statistics and weights that the fused paths use."""
    for norm in norms:
        if type(norm) is not nn.BatchNorm2d or not norm.track_running_stats or norm.weight is None or norm.bias is None:
            return False
    return True


def track(normed: Sequence[Normed], rows: int) -> None:
    """Updates the running statistics of norms that have seen so many rows, and counts the batch."""
    track_statistics([
        Batch(*statistics, norm.running_mean, norm.running_var, rows, norm.momentum, norm.eps)
        for norm, statistics in normed
    ])  # fmt: skip
    times = Counter(norm for norm, _ in normed)  # one that stands in several places is counted by one addition
    with torch.no_grad():
        torch._foreach_add_([norm.num_batches_tracked for norm in times], list(times.values()))


def non_local_block(channels: int, config: NonLocalConfig) -> NonLocalBlock:
    """The block that the configuration describes.

    Raises:
        ValueError: no group, or an inner width that does not divide into the groups.
    """
    inner, groups = config.inner_dim, config.groups
    if groups < 1:
        raise ValueError(f"head.non_local.groups: expected at least 1, got {groups}")
    if inner is None and (channels % 2 or channels // 2 % groups):
        raise ValueError(f"head.non_local.groups: {groups} groups do not divide half of {channels} channels")
    if inner is not None and (inner < 1 or inner % groups):
        raise ValueError(f"head.non_local.inner_dim: expected a positive multiple of groups, {groups}, got {inner}")
    return NonLocalBlock(
        channels,
        inner,
        pairwise=config.pairwise,
        groups=groups,
        scale=config.scale,
        relu_after=config.relu_after,
    )


def fold_non_local(block: NonLocalBlock) -> tuple[Block, list[Tensor]]:
    """Kind and folded weights for `conv_head`."""
    layers = block.theta, block.phi, block.g
    weight = torch.cat([layer.weight.flatten(1) for layer in layers])
    out, bias = fold_norm(block.out, block.norm)
    return Block.NON_LOCAL, [weight, torch.cat([layer.bias for layer in layers]), out.flatten(1), bias]


def layers_of(index: int, block: nn.Module, signed: bool) -> list[Layer]:
    """The layers of a block, the `index`-th of its tower; `signed`: whether the block's input can be negative."""
    if not isinstance(block, NonLocalBlock):
        widening = isinstance(block, WideningBlock)
        names = ("residual.0", "residual.3", "shortcut.0" if widening else "residual.6")
        added = "residual.3" if widening else "residual.6"
        return [
            Layer(
                f"{index}.{name}",
                signed and name in ("residual.0", "shortcut.0"),
                partial(fold_norm, *layer),
                name == added,
            )
            for name, layer in zip(names, block.layers(), strict=True)
        ]

    def qkv() -> tuple[Tensor, Tensor]:
        parts = block.theta, block.phi, block.g
        return torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])

    out = Layer(f"{index}.out", True, partial(fold_norm, block.out, block.norm), added=True, by_map=True)
    return [Layer(f"{index}.qkv", signed, qkv), out]


def conv_norm(inputs: int, outputs: int, kernel: int) -> tuple[nn.Module, nn.Module]:
    """A convolution that keeps the size, and the batch norm that follows it."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs)
