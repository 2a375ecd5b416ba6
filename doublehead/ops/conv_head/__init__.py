"""The conv-head at inference: all blocks, with batch norms folded into the weights, and the average over cells."""

from .op import Block, conv_head

__all__ = ["Block", "conv_head"]
