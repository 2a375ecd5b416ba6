"""Decodes image files to uint8 RGB, in the same way for training, evaluation and detection.

Pillow reads every format.  JPEG pixels come from simplejpeg if it is installed: it uses the same decoder, with the same
pixels, but in a strict mode (see `jpeg`) that detects missing pixels, which Pillow does not.

Channels of 8 bits are kept, channels of 16 bits keep the upper 8, and fewer bits are scaled to 0..255.  Pixels with 32
bits, signed and floating-point pixels have no fixed white level and are refused.  An alpha channel is dropped, not
blended; only the first of several frames is read; colour profiles and gamma are ignored, as in COCO's tools.

Missing data are detected in every format.  Changed data are detected in PNG, by its checksums, and often in JPEG and
GIF, whose decoders lose synchronisation; rarely in TIFF and WebP; never in BMP and PPM, which have no redundancy.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from .jpeg import decode_strictly, is_strict

_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
_SAMPLE_FORMAT, _SIGNED = 339, 2
#: Pillow's mode -> simplejpeg's colour space; other modes are rare.
_JPEG_MODES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}


def to_rgb(image: Image.Image, path: str | Path) -> np.ndarray:
    """The pixels of an opened file: `[H, W, 3]` uint8, in the stored orientation.

    Raises:
        ValueError: incomplete JPEG data, or pixels without a fixed white level.
        Exception: Pillow's decoders may raise almost any for a broken file.
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
    image.info.pop("transparency", None)  # dropped like an alpha channel; otherwise Pillow warns about it
    return np.array(image.convert("RGB"))


def _strict_jpeg(path: Path, mode: str) -> np.ndarray | None:
    """The pixels of a complete JPEG; None: Pillow has to decode it."""
    pixels = decode_strictly(path.read_bytes(), _JPEG_MODES[mode]) if is_strict() else None
    if pixels is None or mode == "CMYK":  # decoded as a check only: Pillow knows which files have inverted ink
        return None
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels


def _upper_8_bits(image: Image.Image) -> np.ndarray:
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, (16,))
    if image.format == "TIFF" and tuple(bits) != (16,):
        raise ValueError(f"pixels of {bits[0]} bits, which have no fixed white here; 8 or 16 bits are accepted")
    levels = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
    return 255 - levels if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else levels
