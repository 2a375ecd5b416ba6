"""Two classifiers' logits joined into one score per class (Equation 4)."""

from .op import fuse_scores
from .reference import FUSIONS

__all__ = ["FUSIONS", "fuse_scores"]
