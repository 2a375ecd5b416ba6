"""Reads image files: the result is uint8 RGB (see `decoding`), or a DataError that names the file.

Orientation: boxes refer to the pixels as stored (COCO's tools) or to the image turned by its EXIF orientation
(labelling tools that show photos upright).  The size in the annotation decides: pixels are used as stored if their size
matches, and turned upright if only that matches.  Without a size they are used as stored.  A size cannot tell whether
boxes refer to an image that is turned by half, mirrored or square: for the formats whose tools all show photographs
upright, YOLO's and LabelMe's, that orientation of a JPEG comes first (`shown_upright`).  Detection uses upright images.

Only regular files are opened, because reading a pipe or a device may block forever.  The number of pixels is checked
before decoding, because a small file may declare an image that fills the memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..config import MAX_PIXELS, MOST_PIXELS
from ..errors import DataError
from .decoding import to_rgb
from .paths import check_regular

END_MARKERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
"""Format -> the last bytes of a complete file."""
EXIF_ORIENTATION = 0x0112
PROGRAMS = {"EPS", "WMF"}
"""Pillow's names of formats with drawing commands, for which it runs Ghostscript or calls Windows."""
PHOTOGRAPHS = ("JPEG", "MPO")
"""Pillow's names of the formats whose EXIF orientation all tools follow."""
#: Orientation -> axes of `[H, W, 3]` to flip, after rows and columns have been swapped (from 5 on).
FLIPS = {1: (), 2: (1,), 3: (0, 1), 4: (0,), 5: (), 6: (1,), 7: (0, 1), 8: (0,)}


def read_image(
    path: str | Path, size: tuple[int, int] | None = None, *, upright: bool = False, shown_upright: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Tensor:  # fmt: skip
    """Decode an image file.

    Args:
        path: any format that Pillow reads, but icons and drawing commands.
        size: (height, width) that the image must have, in the orientation of its boxes.
        upright: apply the EXIF orientation; `size` must be None.
        shown_upright: apply a JPEG's EXIF orientation unless only the stored one has the size.
        max_pixels: refuse a larger image; at most `MOST_PIXELS`.

    Returns:
        `Tensor[3, H, W]`, uint8, RGB; upright images are channels-last in memory, as drawing and uploading need them.

    Raises:
        DataError: no such file, not a regular file, not an image, truncated or damaged, too many pixels, more than 8
            bits per channel in a form that has no fixed white (32-bit integers, floating point), or another size.
    """
    with _reading(path, max_pixels) as image:
        orientation = _orientation(image)
        turned = upright or _is_turned(image, size, path, shown_upright)
        pixels = to_rgb(image, path)
        pixels = torch.from_numpy(_upright(pixels, orientation) if turned else pixels).permute(2, 0, 1)
    return pixels if upright else pixels.contiguous()


def check_image(
    path: str | Path, size: tuple[int, int] | None, decode: bool = False, max_pixels: int = MAX_PIXELS,
    shown_upright: bool = False,
) -> tuple[int, int]:  # fmt: skip
    """The image's (height, width), after checking its header and end; cheap for complete files.

    Args:
        size: see `read_image`; None: any size.
        decode: always decode the file.  Otherwise it is decoded only if its format's end marker is missing, to find
            out whether it is truncated or merely has something appended.
        max_pixels, shown_upright: see `read_image`.

    Raises:
        DataError: see `read_image`.
    """
    with _reading(path, max_pixels) as image:
        width, height = image.size
        turned = _is_turned(image, size, path, shown_upright) and _orientation(image) >= 5
        if not decode and _ends_properly(path, image.format):
            return (width, height) if turned else (height, width)
    pixels = read_image(path, size, shown_upright=shown_upright, max_pixels=max_pixels)
    return pixels.shape[1], pixels.shape[2]


def upright_size(path: str | Path) -> tuple[int, int]:
    """The (height, width) of an image, of a JPEG with its EXIF orientation applied, from its header.

    Raises:
        DataError: see `read_image`; damage in the pixels is not found.
    """
    with _reading(path, MOST_PIXELS) as image:
        width, height = image.size
        turned = image.format in PHOTOGRAPHS and _orientation(image) >= 5
        return (width, height) if turned else (height, width)


@contextmanager
def _reading(path: str | Path, max_pixels: int) -> Iterator[Image.Image]:
    """The opened file; any failure within the context becomes a DataError."""
    check_regular(path, "image")
    try:
        with Image.open(path) as image:
            if image.format in PROGRAMS:
                raise ValueError(f"it holds drawing commands ({image.format}), not pixels; make a PNG of it")
            _check_pixels(image.size, path, max_pixels)
            yield image
    except (DataError, MemoryError):  # a lack of memory is not the image's fault
        raise
    except Image.DecompressionBombError as error:
        raise _too_many(path, f"more than {MOST_PIXELS:,}", max_pixels) from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            empty = os.path.getsize(path) == 0
            reason = "an empty file" if empty else "its format or kind of pixels is unknown to Pillow"
        raise DataError(f"{path}: cannot read this image: {reason}", "unreadable image") from error


def _check_pixels(size: tuple[int, int], path: str | Path, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise _too_many(path, f"{width}x{height} (width x height), {width * height:,}", max_pixels)


def _too_many(path: str | Path, what: str, max_pixels: int) -> DataError:
    way_out = (
        "make it smaller" if max_pixels >= MOST_PIXELS else
        f"make it smaller, or raise the limit with max_pixels (--data.max-pixels, of detect --max-pixels; at most "
        f"{MOST_PIXELS:,})"
    )  # fmt: skip
    return DataError(f"{path}: the image has {what} pixels, {max_pixels:,} are accepted: {way_out}", "too many pixels")


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":  # Pillow turns these itself
        return 1
    if image.format == "PNG":  # its metadata may follow the pixels, which `getexif` would decode inside the `try`
        image.load()
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # Pillow raises many kinds; broken metadata do not affect the pixels
        return 1
    return orientation if orientation in FLIPS else 1


def _is_turned(image: Image.Image, size: tuple[int, int] | None, path: str | Path, shown_upright: bool = False) -> bool:
    """Whether the orientation to use is not the stored one: only the upright one has the size, or it comes first."""
    width, height = image.size
    if shown_upright and image.format in PHOTOGRAPHS:
        orientation = _orientation(image)
        if size in (None, (width, height) if orientation >= 5 else (height, width)):
            return orientation != 1
    if size is None or size == (height, width):
        return False
    if size == (width, height) and _orientation(image) >= 5:
        return True
    wanted = f"{size[1]}x{size[0]}"
    message = f"{path}: the image is {width}x{height} (width x height), its annotation says {wanted}"
    raise DataError(message, "wrong image size")


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    turned = pixels.transpose(1, 0, 2) if orientation >= 5 else pixels
    return np.ascontiguousarray(np.flip(turned, FLIPS[orientation]))


def _ends_properly(path: str | Path, kind: str | None) -> bool:
    marker = END_MARKERS.get(kind or "")
    if marker is None or os.path.getsize(path) < len(marker):
        return False
    with open(path, "rb") as file:
        file.seek(-len(marker), os.SEEK_END)
        return file.read() == marker
