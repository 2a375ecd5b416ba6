"""`NonLocalBlock`: the non-local block with its parameters, and those of mmcv's `NonLocal2d`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from .._checks import check_choice
from .._dtypes import accumulation_dtype, layer_dtype
from .._folded import FoldedWeights, has_inner_hooks, is_plain_conv
from ..batch_norm.layer import Norm, Statistics
from ..batch_norm.op import track_statistics
from .attention import Attention, attention_of
from .op import PAIRWISE, BatchNorm, fold_out, mix, non_local, project
from .training import Projections, serves, train


class NonLocalBlock(nn.Module):
    """y = x + BN(out(attention(theta(x), phi(x)) g(x))) over the cells of each map; see `non_local`.

    `theta`, `phi`, `g` and `out` hold the weights of 1x1 convolutions, and `norm` is a `BatchNorm2d` or None.  They are
    computed together; one after the other with `block.fused = False`, with other modules in their places, or where
    forward hooks wait on them (but torch.compile and export leave such hooks out).  A `norm` of another type, such as
    the one that `SyncBatchNorm.convert_sync_batchnorm` puts there, is called as a module.  `theta`, `phi` and `g` are
    initialised like any convolution of PyTorch, the weight and bias of `out` to zero, as in the authors' release: a
    fresh block adds nothing to x.

    Args:
        channels: width of input and output.
        inner: width of queries, keys and values; None: half of `channels`.
        pairwise: `dot_product` divides the pairwise products by the number of cells, `embedded_gaussian` takes their
            softmax.
        groups: independent parts of the inner width.
        scale: divide the logits of `embedded_gaussian` by sqrt(inner / groups).
        relu_after: ReLU after the residual.
        norm: batch norm after `out`.

    Raises:
        ValueError: the widths do not divide, or `pairwise` is not one of the two.

    Source: Wang et al., Non-local Neural Networks (CVPR 2018).
    """

    def __init__(
        self,
        channels: int,
        inner: int | None = None,
        *,
        pairwise: Literal["dot_product", "embedded_gaussian"] = "dot_product",
        groups: int = 1,
        scale: bool = False,
        relu_after: bool = False,
        norm: bool = True,
    ) -> None:
        super().__init__()
        if inner is None:
            if channels % 2:
                raise ValueError(f"channels must be even where inner is not given, got {channels}")
            inner = channels // 2
        if groups < 1 or inner % groups:
            raise ValueError(f"groups must be at least 1 and divide the inner width {inner}, got {groups}")
        check_choice("pairwise", pairwise, PAIRWISE)
        self.pairwise, self.groups, self.scale, self.relu_after = pairwise, groups, scale, relu_after
        self.fused = True
        self.theta = nn.Conv2d(channels, inner, 1)
        self.phi = nn.Conv2d(channels, inner, 1)
        self.g = nn.Conv2d(channels, inner, 1)
        self.out = nn.Conv2d(inner, channels, 1)
        self.norm = nn.BatchNorm2d(channels) if norm else None
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self._folded = FoldedWeights()

    def forward(self, x: Tensor) -> Tensor:
        """`Tensor[N, channels, H, W]` -> the same shape, channels-last."""
        if not self.fused or not self.is_original() or has_inner_hooks(self):
            return self._by_modules(x)
        attention = {"pairwise": self.pairwise, "groups": self.groups, "scale": self.scale}
        if self._folds(x):
            return non_local(x, *self._folded_weights(x), **attention, relu=self.relu_after)
        if self.trains_fused(x):
            return self._train(x)
        weight, bias = self._qkv()
        if self.norm is not None and type(self.norm) is not nn.BatchNorm2d:
            return self._around_norm(x, weight, bias)
        return non_local(
            x,
            weight,
            bias,
            self.out.weight.flatten(1),
            self.out.bias,
            **attention,
            relu=self.relu_after,
            norm=_batch_norm(self.norm) if self.norm is not None else None,
            training=self.norm is not None and self.norm.training,
        )

    def trains_fused(self, x: Tensor) -> bool:
        """Whether the block is in training, and one function with a gradient of its own serves x, maps or rows."""
        norm = self.norm
        plain = self.fused and type(norm) is nn.BatchNorm2d and norm.training
        whole = plain and norm.weight is not None and norm.bias is not None
        return whole and serves(x) and self.is_original() and not has_inner_hooks(self)

    def train_rows(self, rows: Tensor, size: Sequence[int]) -> tuple[Tensor, Statistics]:
        """As `forward` in training, where `trains_fused`; running statistics are left to the caller.

        Args:
            rows: `Tensor[N * H * W, C]`, the cells of N maps.
            size: (H, W).
        Returns:
            `Tensor[N * H * W, C]`, and the statistics of the batch.
        """
        layers = self.theta, self.phi, self.g
        weights = Projections(
            [layer.weight for layer in layers], [layer.bias for layer in layers], self.out.weight, self.out.bias
        )  # fmt: skip
        norm = Norm(self.norm.weight, self.norm.bias, self.norm.eps)
        return train(rows, size, weights, norm, self.attention(size[0] * size[1]), self.relu_after)

    def _train(self, x: Tensor) -> Tensor:
        number, channels, *size = x.shape
        rows, statistics = self.train_rows(x.permute(0, 2, 3, 1).reshape(-1, channels), size)
        norm = _batch_norm(self.norm)
        if norm.running_mean is not None:
            track_statistics([norm.batch(statistics, len(rows))])
        return rows.view(number, *size, channels).permute(0, 3, 1, 2)

    def is_original(self) -> bool:
        """Whether `theta`, `phi`, `g` and `out` are plain 1x1 convolutions; any other module is called as such."""
        layers = self.theta, self.phi, self.g, self.out
        return all(is_plain_conv(layer, bias=True) and layer.kernel_size == (1, 1) for layer in layers)

    def attention(self, cells: int) -> Attention:
        """The options of the block's attention on maps of so many cells."""
        return attention_of(self.pairwise, self.groups, self.scale, cells=cells, inner=self.theta.out_channels)

    def held_tensors(self) -> list[Tensor]:
        """The folded weights that the last call has read: what a recorded CUDA graph has to keep alive."""
        return self._folded.tensors()

    def train(self, mode: bool = True) -> NonLocalBlock:
        self._folded.forget()
        return super().train(mode)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_folded", FoldedWeights())  # pickles of older versions have none

    def _folds(self, x: Tensor) -> bool:
        """Whether the weights may be prepared once: inference, without gradients."""
        plain = self.norm is None or (
            type(self.norm) is nn.BatchNorm2d and not self.norm.training and self.norm.running_mean is not None
        )
        if not plain or torch.compiler.is_compiling():
            return False
        return not torch.is_grad_enabled() or not (x.requires_grad or any(p.requires_grad for p in self.parameters()))

    def _folded_weights(self, x: Tensor) -> tuple[Tensor, ...]:
        """Weight and bias of queries, keys and values, and of `out` with the norm folded in, for `non_local`."""
        parts = [(layer.weight, layer.bias) for layer in (self.theta, self.phi, self.g, self.out)]
        norm = () if self.norm is None else _batch_norm(self.norm)
        tensors = [tensor for part in (*parts, norm[:4]) for tensor in part if tensor is not None]
        cast = torch.is_autocast_enabled(x.device.type) and self.theta.weight.dtype != torch.float64
        dtype = layer_dtype(x) if cast else self.theta.weight.dtype

        def fold() -> tuple[Tensor, ...]:
            out = self.out.weight.flatten(1), self.out.bias
            if self.norm is not None:
                out = fold_out(_batch_norm(self.norm), *out)
            return tuple(tensor.to(dtype) for tensor in (*self._qkv(), *out))

        return self._folded.get(tensors, (dtype, norm[4:5]), fold)

    def _qkv(self) -> tuple[Tensor, Tensor]:
        layers = self.theta, self.phi, self.g
        return torch.cat([layer.weight.flatten(1) for layer in layers]), torch.cat([layer.bias for layer in layers])

    def _around_norm(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The block with `norm` called as a module."""
        cells = x.permute(0, 2, 3, 1)
        mixed = mix(cells.flatten(1, 2), weight, bias, self.attention(x.shape[2] * x.shape[3]))
        projected = project(mixed, self.out.weight.flatten(1), self.out.bias).view(*cells.shape).permute(0, 3, 1, 2)
        y = x + self.norm(projected)
        return y.relu() if self.relu_after else y

    def _by_modules(self, x: Tensor) -> Tensor:
        """The block module by module: four convolutions, two matrix products, a batch norm."""

        def cells(x: Tensor) -> Tensor:  # [N, D, H, W] -> [N, groups, H * W, D / groups]
            return x.flatten(2).unflatten(1, (self.groups, -1)).transpose(2, 3)

        query, key, value = (cells(layer(x)) for layer in (self.theta, self.phi, self.g))
        if self.pairwise == "dot_product":
            weights = query @ key.transpose(2, 3) / query.shape[2]
        else:
            query = query * query.shape[3] ** -0.5 if self.scale else query
            precise = accumulation_dtype(query.dtype)  # the logits can be large
            weights = torch.softmax(query @ key.transpose(2, 3), dim=3, dtype=precise).to(query.dtype)
        mixed = (weights @ value).transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:])
        y = self.out(mixed)
        y = x + (y if self.norm is None else self.norm(y))
        return y.relu() if self.relu_after else y

    def extra_repr(self) -> str:
        return f"pairwise={self.pairwise!r}, groups={self.groups}, scale={self.scale}, relu_after={self.relu_after}"

    @classmethod
    def from_mmcv(
        cls,
        state_dict: Mapping[str, Tensor],
        *,
        mode: str = "embedded_gaussian",
        use_scale: bool = True,
        sub_sample: bool = False,
        eps: float = 1e-5,
    ) -> NonLocalBlock:
        """The block with the weights of an mmcv 2.x `NonLocal2d`, and its outputs.

        Args:
            state_dict: of that module; widths are read off the weights, and whether there is a batch norm.
            mode: as the module was built, and so the next two; the defaults are mmcv's.
            use_scale: divide the logits of `embedded_gaussian` by sqrt(inner width).
            sub_sample: only False is accepted.
            eps: the batch norm's epsilon, as in `norm_cfg`.

        Raises:
            ValueError: a mode other than `embedded_gaussian` and `dot_product`, `sub_sample`, a norm other than batch
                norm, or weights that are missing or do not belong.
        """
        if mode not in PAIRWISE:
            raise ValueError(f"mode: expected one of {', '.join(PAIRWISE)}, got {mode!r}")
        if sub_sample or any(name.startswith(("g.0.", "phi.0.")) for name in state_dict):
            raise ValueError("sub_sample: expected a module built with sub_sample=False, got one with sub_sample=True")
        has_norm = "conv_out.bn.weight" in state_dict
        renamed = _renamed(state_dict, has_norm)
        inner, channels = renamed["theta.weight"].shape[:2]
        # mmcv gives the last convolution no bias where a batch norm follows it.
        renamed.setdefault("out.bias", renamed["out.weight"].new_zeros(channels))
        block = cls(channels, inner, pairwise=mode, scale=use_scale, norm=has_norm)
        block.to(device=renamed["theta.weight"].device, dtype=renamed["theta.weight"].dtype)
        block.load_state_dict(renamed)
        if has_norm:
            block.norm.eps = eps
        return block


def _batch_norm(norm: nn.BatchNorm2d) -> BatchNorm:
    """The parts of `norm`; counts the batch, as its forward does."""
    momentum = norm.momentum
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:  # the average over all batches
            momentum = 1 / float(norm.num_batches_tracked)
    return BatchNorm(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, momentum or 0.0)


_FROM_MMCV = {"theta.conv": "theta", "phi.conv": "phi", "g.conv": "g", "conv_out.conv": "out", "conv_out.bn": "norm"}


def _renamed(state_dict: Mapping[str, Tensor], has_norm: bool) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state_dict.items():
        layer, _, parameter = name.rpartition(".")
        if layer not in _FROM_MMCV:
            raise ValueError(
                f"state_dict: {name} is no weight of a NonLocal2d with mode {' or '.join(PAIRWISE)} and batch norm or "
                f"none; known are the weights of {', '.join(_FROM_MMCV)}"
            )
        renamed[f"{_FROM_MMCV[layer]}.{parameter}"] = tensor
    needed = [f"{name}.weight" for name in ("theta", "phi", "g", "out")] + ["theta.bias", "phi.bias", "g.bias"]
    missing = [name for name in needed if name not in renamed]
    if not has_norm and "out.bias" not in renamed:
        missing.append("out.bias")
    if missing:
        raise ValueError(f"state_dict: of NonLocal2d's weights, these are missing: {', '.join(missing)}")
    return renamed
