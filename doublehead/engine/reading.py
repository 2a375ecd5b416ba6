"""Pictures from files, for detection: upright, RGB, 8 bits a channel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

EXIF_ORIENTATION = 0x0112
#: What torchvision decodes to the very pixels that Pillow gives; of PNG only those with 8 bits.
FAST_MODES = {"JPEG": {"L", "RGB"}, "MPO": {"RGB"}, "PNG": {"L", "LA", "P", "RGB", "RGBA"}}
PNG_BIT_DEPTH = 24
"""Where the byte stands in the file."""
#: Orientation -> axes of `[H, W, 3]` to flip, after rows and columns have changed places (from 5 on).
FLIPS = {2: [1], 3: [0, 1], 4: [0], 5: [], 6: [1], 7: [0, 1], 8: [0]}


def read_picture(path: Path) -> Tensor:
    """Read a picture and turn it upright as its EXIF note says.

    torchvision decodes what it decodes as Pillow does: faster, and without holding up other threads.  Pillow has the
    last word on everything else, and on every file that torchvision refuses.  Greyscale, palette, CMYK and 16-bit
    pictures are converted (of 16 bits the upper 8 are kept), an alpha channel is dropped.

    Returns:
        `Tensor[3, H, W]` uint8, RGB; its memory is channels last.

    Raises:
        Exception: whatever the decoders make of a broken or truncated file.
    """
    with Image.open(path) as picture:
        if picture.mode in FAST_MODES.get(picture.format or "", ()):
            orientation = picture.getexif().get(EXIF_ORIENTATION, 1)
            pixels = _fast(path, picture.format)
            if pixels is not None:
                return _upright(pixels, orientation)
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I;16"):  # Pillow's own conversion cuts off at 255
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def _fast(path: Path, kind: str) -> Tensor | None:
    """The pixels as stored, or None where torchvision does not decode this file."""
    try:
        from torchvision.io import ImageReadMode, decode_jpeg, decode_png, read_file

        data = read_file(str(path))
        if kind == "PNG":
            return decode_png(data, ImageReadMode.RGB) if data[PNG_BIT_DEPTH] == 8 else None
        return decode_jpeg(data, ImageReadMode.RGB)
    except (
        ImportError,
        RuntimeError,
    ):  # broken, or a torchvision without these (deprecated) decoders: Pillow will tell
        return None


def _upright(pixels: Tensor, orientation: int) -> Tensor:
    if orientation not in FLIPS:
        return pixels
    rows = pixels.permute(1, 2, 0)  # the order of memory
    turned = (rows.transpose(0, 1) if orientation >= 5 else rows).flip(FLIPS[orientation])
    return turned.contiguous().permute(2, 0, 1)
