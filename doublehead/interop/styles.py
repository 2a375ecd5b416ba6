"""The two families of pretrained ResNets that other projects start from, and what their images look like."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import ImageConfig

ANY_WIDTH = 1e-12
"""As `min_size`: drops boxes of no width or height, and no others."""
PIXELS = {
    "caffe": ([103.530, 116.280, 123.675], [1.0, 1.0, 1.0]),
    "pytorch": ([123.675, 116.280, 103.530], [58.395, 57.120, 57.375]),
}
"""Style -> mean and standard deviation of values 0 .. 255; `caffe` in the order BGR, `pytorch` RGB."""


def image_config(
    resize: str,
    style: str,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    channel_order: str | None = None,
    scale: tuple[int, int] | None = None,
) -> ImageConfig:
    """The images that a network of this style wants.

    Args:
        resize: whose way.
        style: `caffe` or `pytorch`.
        mean, std: of values 0 .. 255 in the network's order; None: those of the style.
        channel_order: None: that of the style.
        scale: (short side, longest side) in pixels; None: 800 and 1333, as all these projects have it.
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
