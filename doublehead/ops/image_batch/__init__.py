"""Images of any sizes as one padded batch: resized, normalised and padded in one pass."""

from .op import image_batch

__all__ = ["image_batch"]
