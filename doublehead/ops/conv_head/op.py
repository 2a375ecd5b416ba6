"""The conv-head at inference: the function and the operator."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .._checks import check_count, check_same_dtype, check_tensor
from .._library import define, define_autocast, define_autograd, define_cpu_kernel, define_triton_kernel
from . import cpu, reference
from .arguments import pack
from .blocks import TENSORS, Block


def conv_head(
    x: Tensor,
    tensors: Sequence[Tensor],
    blocks: Sequence[Block],
    count: Tensor | None = None,
    *,
    groups: int = 1,
    softmax: bool = False,
    scale: float = 1.0,
    relu: bool = True,
) -> Tensor:
    """All blocks of a conv-head and the average over cells, for inference: batch norms are folded into the weights.

    Each convolution is one matrix product that ends with its bias, residual and ReLU; the first block's residual branch
    and shortcut are one product; the last product ends with the average.  `count` stays on the device, so that a
    captured CUDA graph serves any number of RoIs: rows from `count` on cost next to nothing.

    Args:
        x: `Tensor[N, C, H, W]`, float16, bfloat16, float32 or float64; channels-last is used without a copy.
        tensors: folded weights and biases of all blocks, one after the other: see `Block`; in the dtype of x.
        blocks: kinds of block, in order; `doublehead.ops.conv_head.Block` or its numbers.
        count: `Tensor[]` int64 on the device of x: only the first `count` RoIs are computed.  None: all.
        groups: independent parts of the non-local blocks' inner width.
        softmax: whether their pairwise products go through a softmax over the keys.
        scale: factor of their pairwise products; 1 / cells in a dot product.
        relu: whether non-local blocks end with ReLU.

    Returns:
        `Tensor[N, dim]` in the dtype of x; zeros from row `count` on.  NaN in the row of a map that is not finite, on a
        GPU in all of it.

    Raises:
        TypeError: not a tensor, or a dtype differs from that of x.
        ValueError: the number of tensors does not fit the blocks, or a shape does not fit.
        RuntimeError: in the backward: there is no gradient.  Training takes the unfolded blocks.

    Source: Wu et al. 2020, Figure 5 and Table 2; the layers are those of the authors' release.
    """
    _check(x, tensors, blocks, count)
    return _op(x, list(tensors), [int(block) for block in blocks], count, groups, softmax, scale, relu)


def _check(x: Tensor, tensors: Sequence[Tensor], blocks: Sequence[int], count: Tensor | None) -> None:
    check_tensor("x", x, "a Tensor[N, C, H, W]")
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x must have shape [N, C, H, W] with C, H, W > 0, got {list(x.shape)}")
    if not blocks or blocks[0] not in (Block.WIDENING, Block.WIDENING_SHORTCUT_RELU):
        raise ValueError(f"blocks must begin with a widening one, got {[Block(block).name for block in blocks]}")
    wanted = sum(TENSORS[block] for block in blocks)
    if len(tensors) != wanted:
        raise ValueError(f"tensors must be {wanted} weights and biases for these blocks, got {len(tensors)}")
    for index, tensor in enumerate(tensors):
        check_tensor(f"tensors[{index}]", tensor, "a tensor")
        check_same_dtype(f"tensors[{index}]", tensor, "x", x)
    check_count(count)


_op = define(
    "conv_head(Tensor x, Tensor[] tensors, int[] blocks, Tensor? count, int groups, bool softmax, float scale, "
    "bool relu) -> Tensor",
    reference=reference.conv_head,
    fake=lambda head: head.x.new_empty((head.x.shape[0], head.tensors[-1].shape[0])),
    pack=pack,
)


def _no_gradient(ctx, grad):
    raise RuntimeError("conv_head has no gradient: it is for inference, with batch norms folded into its weights")


define_autograd("conv_head", _no_gradient, lambda ctx, inputs, output: None)
define_autocast("conv_head", _op)  # the weights were folded in the dtype wanted; x has it too
define_cpu_kernel("conv_head", cpu.conv_head)
define_triton_kernel("conv_head", "doublehead.ops.conv_head.launch", "conv_head")
