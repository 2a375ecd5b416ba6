"""Detectron2: patches its process to use our operators, or converts its weights."""

from ..patching import renamed
from .patch import patch, unpatch

accelerate = renamed("doublehead.interop.detectron2.accelerate", patch)
restore = renamed("doublehead.interop.detectron2.restore", unpatch)

__all__ = ["accelerate", "patch", "restore", "unpatch"]
