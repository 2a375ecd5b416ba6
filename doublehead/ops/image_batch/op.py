"""The image batch: the function and the operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import check_same_device, check_tensor
from .._dtypes import FLOATS
from .._library import define, define_autocast, define_autograd, define_cpu_kernel, define_triton_kernel
from . import cpu, reference
from .arguments import ImageBatchArguments, empty_batch


def image_batch(
    images: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    canvas: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    swap: bool = False,
    rounded: bool = False,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Tensor:
    """Images of any sizes as one batch: each is resized, normalised, and padded with zeros at the right and below.

    Resizing is bilinear with half-pixel centres and without antialiasing, as `interpolate(mode="bilinear")`.  Pixels
    become (value - mean) / std, where white has the value 1.  Shapes depend on `sizes` and `canvas` alone, and nothing
    is read back from the device.  Computed in float32, in float64 for a batch in float64.  Differentiable any number
    of times with respect to floating images (which then run in plain PyTorch).

    Args:
        images: each `Tensor[3, h, w]`, uint8 (white is 255) or floating (white is 1), any strides: pixels as decoders
            give them (channels last in memory) are read where they are.
        sizes: (height, width) in pixels of each resized image, at least 1.
        canvas: (H, W) of the batch, at least the largest size.
        mean: the mean of each of the batch's three channels, that is after `swap`.
        std: the standard deviation of each, not 0.
        swap: the batch has the channels in reverse order: RGB becomes BGR.
        rounded: resized pixels are rounded to the levels 0 .. 255 before they are normalised (halves up), as if
            images were resized as integers.  The gradient passes the rounding unchanged.
        dtype: the batch's dtype: float16, bfloat16, float32 or float64.
        channels_last: the batch's memory format.

    Returns:
        `Tensor[B, 3, H, W]`.

    Raises:
        TypeError: an image that is no tensor, or an image or `dtype` of another dtype.
        ValueError: no image, shapes, sizes or devices do not fit, or `std` contains 0.
    """
    images = list(images)
    _check(images, sizes, canvas, mean, std, dtype)
    flat = [side for size in sizes for side in size]
    arguments = ImageBatchArguments(
        images, flat, *canvas, list(mean), list(std), swap, rounded, dtype, channels_last
    )  # fmt: skip
    if torch.is_grad_enabled() and any(image.requires_grad for image in images):
        return reference.image_batch(arguments)
    return _image_batch(*arguments)


def _check(images, sizes, canvas, mean, std, dtype) -> None:
    if not images:
        raise ValueError("images must hold at least one image, got an empty list")
    if len(sizes) != len(images):
        raise ValueError(f"sizes must be one for each of the {len(images)} images, got {len(sizes)}")
    for index, (image, size) in enumerate(zip(images, sizes, strict=True)):
        check_tensor(f"images[{index}]", image, "a Tensor[3, h, w]")
        if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise ValueError(f"images[{index}] must have shape [3, h, w], not empty, got {list(image.shape)}")
        if image.dtype != torch.uint8 and image.dtype not in FLOATS:
            raise TypeError(f"images[{index}] must be uint8, float16, bfloat16, float32 or float64, got {image.dtype}")
        check_same_device(f"images[{index}]", image, "images[0]", images[0])
        if len(size) != 2 or min(size) < 1 or size[0] > canvas[0] or size[1] > canvas[1]:
            raise ValueError(
                f"sizes[{index}] must be (height, width) from 1 to canvas {tuple(canvas)}, got {tuple(size)}"
            )
    if len(mean) != 3 or len(std) != 3 or 0 in tuple(std):
        raise ValueError(f"mean and std must have 3 numbers, std none that is 0, got {tuple(mean)} and {tuple(std)}")
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")


# ---------------------------------------------------------------------------------------------
# Registration


_image_batch = define(
    "image_batch(Tensor[] images, SymInt[] sizes, SymInt height, SymInt width, float[] mean, float[] std, bool swap, "
    "bool rounded, ScalarType dtype, bool channels_last) -> Tensor",
    reference=reference.image_batch,
    fake=empty_batch,
    pack=lambda *arguments: (ImageBatchArguments(*arguments),),
)


def _backward(ctx, grad):
    raise RuntimeError("torch.ops.doublehead.image_batch has no gradient, but doublehead.ops.image_batch has one")


define_autograd("image_batch", _backward, lambda ctx, inputs, output: None)
define_autocast("image_batch", lambda *arguments: _image_batch(*arguments))  # any dtype will do
define_cpu_kernel("image_batch", cpu.image_batch)
define_triton_kernel("image_batch", "doublehead.ops.image_batch.kernel", "image_batch")
