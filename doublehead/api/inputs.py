"""Images as people have them, files, PIL images, arrays, tensors: each checked, and as a tensor for the model."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from doublehead.config import MAX_PIXELS
from doublehead.data import read_image
from doublehead.data.decoding import to_rgb
from doublehead.data.images import EXIF_ORIENTATION
from doublehead.engine.picture_files import URL, VIDEOS, how_to_split, what_url
from doublehead.errors import UserError, one_line

ACCEPTED = "a path, a PIL image, an array [H, W, 3] (uint8, or floats in 0..1) or a Tensor[3, H, W] (the same)"
ROUNDING = 1e-3
"""How far floats may lie outside of 0..1: resizing and conversions round."""


def to_tensors(images: Any, max_pixels: int = MAX_PIXELS) -> tuple[Iterator[Tensor], bool]:
    """The images one after the other, each read when it is asked for (see `to_tensor`), and whether it is a single one.

    Args:
        images: one image, an iterable of images, or a batch: `Tensor[B, 3, H, W]`, an array [B, H, W, 3].

    Raises:
        TypeError: neither an image nor an iterable.
    """
    if isinstance(images, (Tensor, np.ndarray)) and images.ndim == 4:
        return _each(images, max_pixels), False
    if isinstance(images, (str, os.PathLike, Image.Image, Tensor, np.ndarray)):
        return (to_tensor(image, "image", max_pixels) for image in (images,)), True
    if isinstance(images, (bytes, bytearray, Mapping)) or not isinstance(images, Iterable):
        raise _wrong_type("image", images)
    return _each(images, max_pixels), False


def to_tensor(image: Any, name: str = "image", max_pixels: int = MAX_PIXELS) -> Tensor:
    """One image for the model.

    Args:
        image: a file's path (turned upright by its EXIF note), a PIL image of any mode, an array [H, W, 3] or [H, W],
            or a `Tensor[3, H, W]` or `Tensor[H, W]`; arrays and tensors RGB or grey, uint8 or floats in 0..1.
        name: what messages call it.
        max_pixels: larger files are not read.

    Returns:
        `Tensor[3, H, W]` RGB, uint8, or float32 in 0..1.

    Raises:
        TypeError: none of these.
        UserError: it cannot be read, or has another shape, dtype or range.
    """
    if isinstance(image, (str, os.PathLike)):
        return _from_file(image, name, max_pixels)
    if isinstance(image, Image.Image):
        return _from_picture(image, name)
    if isinstance(image, np.ndarray):
        return _from_array(image, name)
    if isinstance(image, Tensor):
        return _from_tensor(image, name)
    raise _wrong_type(name, image)


def _each(images: Iterable[Any], max_pixels: int) -> Iterator[Tensor]:
    for number, image in enumerate(images):
        yield to_tensor(image, f"images[{number}]", max_pixels)


def _wrong_type(name: str, image: Any) -> TypeError:
    hint = ""
    if isinstance(image, (bytes, bytearray)):
        hint = "; PIL.Image.open(io.BytesIO(data)) opens an encoded image"
    elif isinstance(image, Mapping):
        hint = "; give the images alone"
    elif image is None:
        hint = "; cv2.imread gives None for a file that it cannot read"
    return TypeError(f"{name} is {_article(type(image).__name__)}: expected {ACCEPTED}, or a list of them{hint}")


def _article(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def _from_file(path: str | os.PathLike, name: str, max_pixels: int) -> Tensor:
    text = os.fsdecode(path)
    shown = one_line(repr(text[:200]))
    if url := URL.match(text):
        raise UserError(f"{name} is {shown}, {what_url(text, url[1].lower())}")
    if Path(text).suffix.lower() in VIDEOS:
        raise UserError(f"{name} is {shown}, a video: {how_to_split(text)}")
    if os.path.isdir(text):
        raise UserError(
            f"{name} is {shown}, a folder: give its files, such as sorted(pathlib.Path({shown}).glob('*.jpg')), or use "
            "the command doublehead detect"
        )
    if re.search(r"[*?\[]", text) and not os.path.lexists(text):
        raise UserError(f"{name} is {shown}: no such file; give a pattern's files, sorted(glob.glob({shown}))")
    return read_image(text, upright=True, max_pixels=max_pixels)


def _from_picture(picture: Image.Image, name: str) -> Tensor:
    if 0 in picture.size:
        raise UserError(f"{name} has no pixels: its size is {picture.size}")
    try:
        if picture.getexif().get(EXIF_ORIENTATION, 1) != 1:
            warnings.warn(
                f"{name}: its EXIF note turns it, and its pixels are taken as they are: give "
                "PIL.ImageOps.exif_transpose(image), or the path of its file, which is read upright",
                UserWarning,
                stacklevel=2,
            )
        # A copy: conversion drops notes on transparency, and of a JPEG the file would be read again.
        plain = picture.copy() if picture.format in ("JPEG", "MPO") or "transparency" in picture.info else picture
        pixels = to_rgb(plain, getattr(picture, "filename", ""))
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        raise UserError(
            f"{name}: this PIL image cannot be used: {one_line(str(error)) or type(error).__name__}"
        ) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _from_array(array: np.ndarray, name: str) -> Tensor:
    shape = list(array.shape)
    grey = array.ndim == 2 or (array.ndim == 3 and shape[2] == 1)
    if not (grey or (array.ndim == 3 and shape[2] == 3)) or 0 in shape:
        hint = ""
        if array.ndim == 3 and shape[0] in (1, 3):
            hint = ": image.transpose(1, 2, 0) puts the channels last; a Tensor has them first"
        elif array.ndim == 3 and shape[2] == 4:
            hint = ": image[..., :3] leaves out the fourth channel"
        raise UserError(f"{name} is {shape}, arrays are [H, W, 3], RGB, or [H, W], grey{hint}")
    if array.dtype == np.uint8:
        tensor = torch.from_numpy(np.array(array, order="C"))  # a copy: strides may be negative, memory read-only
    elif np.issubdtype(array.dtype, np.floating):
        _check_levels(float(array.min()), float(array.max()), name)
        tensor = torch.from_numpy(np.array(array, np.float32, order="C"))
    else:
        raise _wrong_dtype(name, array.dtype, "image.astype(numpy.uint8)", "(image >> 8).astype(numpy.uint8)")
    return tensor.reshape(1, *shape[:2]).expand(3, -1, -1) if grey else tensor.permute(2, 0, 1)


def _from_tensor(tensor: Tensor, name: str) -> Tensor:
    shape = list(tensor.shape)
    grey = tensor.ndim == 2 or (tensor.ndim == 3 and shape[0] == 1)
    if not (grey or (tensor.ndim == 3 and shape[0] == 3)) or 0 in shape:
        hint = ""
        if tensor.ndim == 3 and shape[2] in (1, 3):
            hint = ": image.permute(2, 0, 1) puts the channels first; a NumPy array has them last"
        elif tensor.ndim == 3 and shape[0] == 4:
            hint = ": image[:3] leaves out the fourth channel"
        raise UserError(f"{name} is {shape}, tensors are [3, H, W], RGB, or [H, W], grey{hint}")
    tensor = tensor.detach().as_subclass(Tensor)
    if tensor.is_floating_point():
        low, high = torch.aminmax(tensor)
        _check_levels(float(low), float(high), name)
        tensor = tensor.to(torch.float32)
    elif tensor.dtype != torch.uint8:
        raise _wrong_dtype(name, tensor.dtype, "image.to(torch.uint8)", "(image >> 8).to(torch.uint8)")
    return tensor.reshape(1, *shape[-2:]).expand(3, -1, -1) if grey else tensor


def _wrong_dtype(name: str, dtype: Any, of_8_bits: str, of_16_bits: str) -> UserError:
    return UserError(
        f"{name}: levels are uint8, or floats in 0..1, and these are {dtype}: if they lie in 0..255, {of_8_bits}; "
        f"of 16 bits, {of_16_bits}"
    )


def _check_levels(low: float, high: float, name: str) -> None:
    """Refuse floats that are no levels in 0..1."""
    if not (abs(low) < float("inf") and abs(high) < float("inf")):  # NaN is not below it
        raise UserError(f"{name}: has NaN or infinite values; floats are levels in 0..1")
    if low < -ROUNDING:
        raise UserError(
            f"{name}: floats are levels in 0..1, and these run from {low:g} to {high:g}: the model subtracts mean and "
            "divides by std itself, so leave the normalisation out"
        )
    if high > 1 + ROUNDING:
        by = "255" if high <= 256 else "their largest possible level (65535 for 16 bits)"
        uint8 = ", or give them as uint8" if high <= 256 else ""
        raise UserError(f"{name}: floats are levels in 0..1, and these go up to {high:g}: divide by {by}{uint8}")
