"""Reading image files: every one becomes uint8 RGB or a DataError that names it.

Greyscale, palette, CMYK, 1-bit and 16-bit files are converted (of 16 bits, the upper 8 are kept); an alpha channel is
dropped, not blended.  Pillow refuses truncated files, which other decoders fill with grey.

Which way up: boxes belong to one of two frames, the pixels as stored (the COCO tools) or turned by the EXIF
orientation (labelling tools that show photos upright).  The size in the annotation tells: pixels are taken as stored
where that size fits, and turned upright where only this fits.  Without a size they are taken as stored.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .dataset import DataError

END_MARKERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
"""The last bytes of a complete file."""
EXIF_ORIENTATION = 0x0112


def read_image(path: str | Path, size: tuple[int, int] | None = None) -> Tensor:
    """Decode an image file.

    Args:
        path: any format that Pillow reads.
        size: (height, width) the image must have, in the frame in which its boxes are given.

    Returns:
        `Tensor[3, H, W]`, uint8, RGB.

    Raises:
        DataError: no such file, not an image, truncated, more than 8 bits per channel in a form that has no fixed
            white (32-bit integers, floating point), or another size.
    """
    with _reading(path) as image:
        rgb = _to_rgb(ImageOps.exif_transpose(image) if _is_turned(image, size, path) else image)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()


def check_image(path: str | Path, size: tuple[int, int] | None, decode: bool = False) -> tuple[int, int]:
    """The image's (height, width), after a look at its header and its end; cheap for files that are whole.

    Args:
        size: as for `read_image`; None: whatever the file has.
        decode: decode it in any case.  Otherwise only a file without its format's end marker is decoded, to see
            whether it is truncated or merely has something appended.

    Raises:
        DataError: as `read_image`.
    """
    with _reading(path) as image:
        width, height = image.size
        turned = _is_turned(image, size, path)
        if not decode and _ends_properly(path, image.format):
            return (width, height) if turned else (height, width)
    pixels = read_image(path, size)
    return pixels.shape[1], pixels.shape[2]


@contextmanager
def _reading(path: str | Path) -> Iterator[Image.Image]:
    """The opened file; whatever fails on the way becomes a DataError."""
    try:
        with Image.open(path) as image:
            yield image
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such image file", "missing image") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        raise DataError(f"{path}: cannot read this image: {error}", "unreadable image") from error


def _is_turned(image: Image.Image, size: tuple[int, int] | None, path: str | Path) -> bool:
    """Does only the upright frame have the wanted size?"""
    width, height = image.size
    if size is None or size == (height, width):
        return False
    if size == (width, height) and image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8):
        return True
    wanted = f"{size[1]}x{size[0]}"
    message = f"{path}: the image is {width}x{height} (width x height), its annotation says {wanted}"
    raise DataError(message, "wrong image size")


def _ends_properly(path: str | Path, kind: str | None) -> bool:
    marker = END_MARKERS.get(kind or "")
    if marker is None or os.path.getsize(path) < len(marker):
        return False
    with open(path, "rb") as file:
        file.seek(-len(marker), os.SEEK_END)
        return file.read() == marker


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no fixed white; 8 or 16 bits are accepted")
    return image.convert("RGB")
