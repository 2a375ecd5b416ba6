"""Products of 8-bit integers on a CPU, by oneDNN: what quantised towers are made of.

An input's integers are unsigned (`Grid`), a weight's are signed with one scale for each output channel.  The sums are
exact, in 32 bits; bias, residual, ReLU and the rounding to the next product's integers happen in the same kernel.
"""

from .grid import Grid, grid_of, quantize, quantize_weight
from .op import PackedWeight, add_product, pack, product
from .support import Support, int8_support

__all__ = [
    "Grid",
    "PackedWeight",
    "Support",
    "add_product",
    "grid_of",
    "int8_support",
    "pack",
    "product",
    "quantize",
    "quantize_weight",
]
