"""The non-local block."""

from .module import NonLocalBlock
from .op import BatchNorm, non_local

__all__ = ["BatchNorm", "NonLocalBlock", "non_local"]
