"""3x3 convolutions by Winograd's method, with a quarter of the multiplications: inference on a CPU in float32."""

from .choice import pays
from .op import convolution, pack

__all__ = ["convolution", "pack", "pays"]
