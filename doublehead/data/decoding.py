"""From an image file's bytes to uint8 RGB: the one way for training, evaluation and detection.

Pillow reads every format; JPEG's pixels come from simplejpeg where it is installed: the same decoder and the same
pixels, but told to be strict (see `jpeg`), where Pillow cannot see that pixels are missing.

Brightness: a channel of 8 bits is taken as it is, of 16 bits the upper 8 are kept, fewer bits are spread over 0..255.
Pixels of 32 bits, signed ones and floating ones have no fixed white and are refused.  An alpha channel is dropped, not
blended; of several frames the first is read; colour profiles and gamma are left alone, as COCO's tools leave them.

Missing data are noticed in every format.  Changed data are noticed in PNG, by its checksums, and often in JPEG and GIF,
whose decoders fall out of step; seldom in TIFF and WebP, never in BMP and PPM, which have nothing to tell it by.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from .jpeg import decode_strictly, is_strict

_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
_SAMPLE_FORMAT, _SIGNED = 339, 2
#: Pillow's mode -> simplejpeg's colour space; what is not here is a rarity.
_JPEG_MODES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}


def to_rgb(image: Image.Image, path: str | Path) -> np.ndarray:
    """The pixels of an opened, not yet decoded file: `[H, W, 3]` uint8, as stored (not turned).

    Raises:
        ValueError: JPEG data that are not whole, or pixels without a fixed white.
        Exception: whatever Pillow's decoders make of a broken file.
    """
    if image.format in ("JPEG", "MPO") and image.mode in _JPEG_MODES:
        pixels = _strict_jpeg(Path(path), image.mode)
        if pixels is not None:
            return pixels
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        grey = _upper_8_bits(image)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no fixed white; 8 or 16 bits are accepted")
    if image.format == "TIFF" and _SIGNED in image.tag_v2.get(_SAMPLE_FORMAT, ()):  # Pillow shows -1 as 255
        raise ValueError("signed pixels have no fixed white; unsigned ones of 8 or 16 bits are accepted")
    image.load()
    image.info.pop("transparency", None)  # dropped like an alpha channel; else Pillow warns of it
    return np.array(image.convert("RGB"))


def _strict_jpeg(path: Path, mode: str) -> np.ndarray | None:
    """The pixels of a JPEG that is whole; None: Pillow is to decode it."""
    pixels = decode_strictly(path.read_bytes(), _JPEG_MODES[mode]) if is_strict() else None
    if pixels is None or mode == "CMYK":  # only looked through: Pillow knows whose ink is inverted
        return None
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels


def _upper_8_bits(image: Image.Image) -> np.ndarray:
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, (16,))
    if image.format == "TIFF" and tuple(bits) != (16,):
        raise ValueError(f"pixels of {bits[0]} bits, which have no fixed white here; 8 or 16 bits are accepted")
    levels = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
    return 255 - levels if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else levels
