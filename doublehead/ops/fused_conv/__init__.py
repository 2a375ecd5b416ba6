"""1x1 and 3x3 convolution of small maps as a matrix product that ends with bias, residual, ReLU and average."""

from .op import fused_conv

__all__ = ["fused_conv"]
