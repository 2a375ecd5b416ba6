"""The conv-head at inference: all its blocks, with batch norm folded into the weights, and the average of its cells."""

from .op import Block, conv_head

__all__ = ["Block", "conv_head"]
