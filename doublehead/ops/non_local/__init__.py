"""The non-local block."""

from .attention import Attention, attention_of
from .module import NonLocalBlock
from .op import BatchNorm, non_local

__all__ = ["Attention", "BatchNorm", "NonLocalBlock", "attention_of", "non_local"]
