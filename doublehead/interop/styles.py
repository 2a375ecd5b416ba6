"""The two families of pretrained ResNets that other projects start from, and the image format of each."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import ImageConfig

ANY_WIDTH = 1e-12
"""A value for `min_size` that drops only boxes of zero width or height."""
PIXELS = {
    "caffe": ([103.530, 116.280, 123.675], [1.0, 1.0, 1.0]),
    "pytorch": ([123.675, 116.280, 103.530], [58.395, 57.120, 57.375]),
}
"""Style -> mean and standard deviation of pixel values in 0 .. 255; `caffe` in BGR order, `pytorch` in RGB."""


def image_config(
    resize: str,
    style: str,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    channel_order: str | None = None,
    scale: tuple[int, int] | None = None,
) -> ImageConfig:
    """The image configuration for a network of this style.

    Args:
        resize: the project whose resizing is used.
        style: `caffe` or `pytorch`.
        mean, std: of pixel values in 0 .. 255, in the network's channel order; None: the style's.
        channel_order: `rgb` or `bgr`; None: the style's.
        scale: (short side, longest side) in pixels; None: 800 and 1333, the default of all these projects.
    """
    short, longest = scale or (800, 1333)
    return ImageConfig(
        min_size=(short,),
        max_size=longest,
        mean=tuple(value / 255 for value in mean or PIXELS[style][0]),
        std=tuple(value / 255 for value in std or PIXELS[style][1]),
        channel_order=channel_order or ("bgr" if style == "caffe" else "rgb"),
        resize=resize,
    )
