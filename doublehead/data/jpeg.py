"""Decodes JPEG data strictly.  libjpeg fills missing parts with grey and continues after damage, with only a warning;
simplejpeg turns every warning into an error.

Some warnings concern harmless defects that are common in photos and data sets:

    a phone's "Invalid SOS parameters"      three bytes that only progressive images use
    bytes between the header's segments     ignored by every decoder
    a few bytes before the end marker       padding; more are undecoded data after damage
    a wrong ICC marker                      from a colour profile, which is not used

Only the first warning is reported, and it may hide one about damage.  So these defects are repaired in memory, and the
result is decoded strictly again.
"""

from __future__ import annotations

import re
from functools import cache
from types import ModuleType

import numpy as np

SPARE_BYTES = 16
"""From this number on, bytes before the end marker are not padding."""
_START_OF_SCAN, _END, _ICC = 0xDA, 0xD9, 0xE2
_SEQUENTIAL = {0xC0, 0xC1}
_ALONE = {0x01, *range(0xD0, 0xD9)}
"""Markers without length and content."""
_MARKER = re.compile(rb"\xff+([^\x00\xff])", re.DOTALL)
_SPARE = re.compile(r"Corrupt JPEG data: (\d+) extraneous bytes before marker 0xd9")
_DAMAGED = re.compile(r"corrupt jpeg data|premature end|bogus|invalid", re.IGNORECASE)


def is_strict() -> bool:
    """Whether simplejpeg is installed, so that damage inside a JPEG is detected."""
    return _simplejpeg() is not None


@cache
def _simplejpeg() -> ModuleType | None:
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def decode_strictly(data: bytes, colours: str) -> np.ndarray | None:
    """The pixels of a complete JPEG: `[H, W, C]` uint8; None: Pillow has to decode it.

    Args:
        colours: simplejpeg's name for a colour space: GRAY, RGB or CMYK.

    Raises:
        ValueError: pixels are missing or damaged.
    """
    library = _simplejpeg()
    if library is None:
        return None
    text = ""
    for repair in (_with_repaired_header, _without_padding, None):
        try:
            return library.decode_jpeg(data, colours, strict=True)
        except ValueError as error:
            text = str(error)
        data = repair(data, text) if repair else data
    if _DAMAGED.search(text):
        raise ValueError(f"damaged: some pixels are missing ({text})")
    return None  # a kind of JPEG that simplejpeg does not support: Pillow decides


def _with_repaired_header(data: bytes, warning: str) -> bytes:
    """The data without bytes between header segments, without colour profile, and with valid sequential parameters."""
    segments, position, sequential = [data[:2]], 2, False
    while marker := _MARKER.search(data, position):
        code, start = marker[1][0], marker.end()
        position = start + (0 if code in _ALONE else int.from_bytes(data[start : start + 2], "big"))
        segment = b"\xff" + data[start - 1 : position]
        sequential |= code in _SEQUENTIAL
        if code == _START_OF_SCAN:
            segments.append(segment[:-3] + b"\0\x3f\0" if sequential else segment)
            return b"".join(segments) + data[position:]
        if code != _ICC:
            segments.append(segment)
    return data


def _without_padding(data: bytes, warning: str) -> bytes:
    """The data without the padding before the end marker, if libjpeg's warning is about that."""
    spare = _SPARE.fullmatch(warning)
    end = data.find(bytes((0xFF, _END)), data.find(bytes((0xFF, _START_OF_SCAN))))
    if not spare or int(spare[1]) >= SPARE_BYTES:
        return data
    return data[: end - int(spare[1])] + data[end:]
