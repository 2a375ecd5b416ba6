"""MMDetection: patches its process to use our operators, or converts its weights."""

from ..patching import renamed
from .patch import patch, unpatch

accelerate = renamed("doublehead.interop.mmdet.accelerate", patch)
restore = renamed("doublehead.interop.mmdet.restore", unpatch)

__all__ = ["accelerate", "patch", "restore", "unpatch"]
