"""The options of the attention operators, and the rule that they follow from."""

from __future__ import annotations

from typing import NamedTuple


class Attention(NamedTuple):
    """The options of the attention operators; see `reference.non_local_attention`."""

    groups: int
    """Independent parts of the inner width."""
    softmax: bool
    """Whether the pairwise products go through a softmax over the keys."""
    scale: float
    """Factor of the pairwise products."""


def attention_of(pairwise: str, groups: int, scale: bool, *, cells: int, inner: int) -> Attention:
    """The attention of a non-local block.

    Args:
        pairwise: `dot_product` divides the pairwise products by the number of cells, `embedded_gaussian` takes their
            softmax.
        groups: independent parts of the inner width.
        scale: `embedded_gaussian` divides the products by the square root of a group's width.
        cells: the number of cells of a map, H * W.
        inner: width of queries, keys and values.
    """
    if pairwise == "dot_product":
        return Attention(groups, False, 1 / cells)
    return Attention(groups, True, (inner // groups) ** -0.5 if scale else 1.0)
