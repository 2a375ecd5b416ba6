"""JPEG data decoded strictly.  libjpeg fills what is missing of a picture with grey and decodes on behind damage, with
nothing but a warning; simplejpeg makes an error of every warning.

Some warnings are of files that cameras and common sets are full of, and whose pixels are all there:

    a phone's "Invalid SOS parameters"      three bytes that only progressive pictures use
    bytes between the header's segments     skipped by every decoder
    a few bytes before the end marker       padding; more are what damage in the middle left undecoded
    a wrong ICC marker                      a colour profile's, which is not used

Only the first of several warnings is told, and may hide one of damage behind it.  So these faults are mended in memory,
and the result is decoded strictly once more.
"""

from __future__ import annotations

import re
from functools import cache
from types import ModuleType

import numpy as np

SPARE_BYTES = 16
"""So many bytes before the end marker are too many for padding."""
_START_OF_SCAN, _END, _ICC = 0xDA, 0xD9, 0xE2
_SEQUENTIAL = {0xC0, 0xC1}
_ALONE = {0x01, *range(0xD0, 0xD9)}
"""Markers without a length and content."""
_MARKER = re.compile(rb"\xff+([^\x00\xff])", re.DOTALL)
_SPARE = re.compile(r"Corrupt JPEG data: (\d+) extraneous bytes before marker 0xd9")
_DAMAGED = re.compile(r"corrupt jpeg data|premature end|bogus|invalid", re.IGNORECASE)


def is_strict() -> bool:
    """Whether damage inside of a JPEG is noticed: simplejpeg is installed."""
    return _simplejpeg() is not None


@cache
def _simplejpeg() -> ModuleType | None:
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def decode_strictly(data: bytes, colours: str) -> np.ndarray | None:
    """The pixels of a JPEG that is whole: `[H, W, C]` uint8; None: Pillow is to decode it.

    Args:
        colours: simplejpeg's name of a colour space: GRAY, RGB or CMYK.

    Raises:
        ValueError: pixels are missing or damaged.
    """
    library = _simplejpeg()
    if library is None:
        return None
    text = ""
    for mend in (_header_mended, _padding_cut, None):
        try:
            return library.decode_jpeg(data, colours, strict=True)
        except ValueError as error:
            text = str(error)
        data = mend(data, text) if mend else data
    if _DAMAGED.search(text):
        raise ValueError(f"damaged: its pixels are not all there ({text})")
    return None  # not simplejpeg's kind of JPEG: Pillow has the last word


def _header_mended(data: bytes, warning: str) -> bytes:
    """Up to the first scan: no bytes between the segments, no colour profile, parameters that fit a sequential scan."""
    segments, place, sequential = [data[:2]], 2, False
    while marker := _MARKER.search(data, place):
        code, start = marker[1][0], marker.end()
        place = start + (0 if code in _ALONE else int.from_bytes(data[start : start + 2], "big"))
        segment = b"\xff" + data[start - 1 : place]
        sequential |= code in _SEQUENTIAL
        if code == _START_OF_SCAN:
            segments.append(segment[:-3] + b"\0\x3f\0" if sequential else segment)
            return b"".join(segments) + data[place:]
        if code != _ICC:
            segments.append(segment)
    return data


def _padding_cut(data: bytes, warning: str) -> bytes:
    """Without the few bytes before the end marker, if these are what libjpeg warns of."""
    spare = _SPARE.fullmatch(warning)
    end = data.find(bytes((0xFF, _END)), data.find(bytes((0xFF, _START_OF_SCAN))))
    if not spare or int(spare[1]) >= SPARE_BYTES:
        return data
    return data[: end - int(spare[1])] + data[end:]
