"""Between a user's images and the padded batch the detector works on.

Weights know the pixels they were trained on, and projects resize in different ways (`ImageConfig.resize`).  Each wants
the short side at `min_size`, the long side at most at `max_size`:

    name                 new size                                             interpolation (bilinear)
    torchvision          floor(side * factor)                                 not antialiased, floating point
    detectron2           floor(side * factor + 1/2), the cap in a second      antialiased as Pillow's, rounded to levels
                         multiplication
    mmdet                floor(side * factor + 1/2)                           not antialiased as OpenCV's, rounded
    maskrcnn_benchmark   the short side min_size, or round(max_size * short   antialiased as Pillow's, rounded to levels
                         / long) where the cap bites; the long side floored

A side is never less than one pixel; the sources refuse images so thin.  Levels may differ by one of 255 from OpenCV's,
which cuts off where this rounds (in every eighth pixel), and from Pillow's (see `pillow_resize`).  A gradient passes
through rounding as if it were not there.  Floating images are taken as levels / 255.

Sources: torchvision.models.detection.transform.GeneralizedRCNNTransform; detectron2.data.transforms.ResizeShortestEdge;
mmdet.datasets.transforms.Resize(keep_ratio=True) and mmcv.imrescale; maskrcnn_benchmark.data.transforms.Resize.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ..config import ImageConfig
from ..ops import image_batch
from ..ops.image_batch.reference import RoundLevels
from .structures import Detections, ImageBatch, Targets, pad_targets

Size = tuple[int, int]


class BoxMap(NamedTuple):
    """Carries an image's boxes from one frame into another: the user's image, the batch."""

    scale: Tensor
    """`Tensor[4]`."""
    shift: Tensor
    """`Tensor[4]`."""
    min_side: float
    """The least width and height of a mapped box, in pixels of the new frame; 0: no limit."""

    def __call__(self, boxes: Tensor) -> Tensor:
        """`Tensor[..., 4]` -> `Tensor[..., 4]`, x1, y1, x2, y2 in pixels of either frame."""
        moved = boxes * self.scale + self.shift
        if self.min_side == 0:
            return moved
        low, high = moved.split(2, dim=-1)
        return torch.cat((low, torch.maximum(high, low + self.min_side)), dim=-1)


class ImageTransform(nn.Module):
    """Resize, normalise and pad a list of images; carry boxes there and back.

    Args:
        config: the sizes, the way to resize, the normalisation and the order of channels.
        legacy_boxes: the network's boxes are those of a project in which they end at their last pixel (see
            `ModelConfig.legacy_boxes`), and in which that pixel's coordinate is what is scaled between the user's image
            and the batch: x2 becomes (x2 - 1) * ratio + 1, as does y2.
    """

    def __init__(self, config: ImageConfig, legacy_boxes: bool = False) -> None:
        super().__init__()
        self.config = config
        self.legacy_boxes = legacy_boxes
        self._warned = False
        # Follows the model: its device and dtype, not its value, are those of the batches.
        self.register_buffer("device_marker", torch.zeros(()), persistent=False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle; in models that version 0.1.0 pickled whole, `device_marker` has its former name."""
        if "place" in state["_buffers"]:
            buffers = {"device_marker" if name == "place" else name: x for name, x in state["_buffers"].items()}
            state = state | {"_buffers": buffers, "_non_persistent_buffers_set": {"device_marker"}}
        super().__setstate__(state)

    def forward(self, images: Sequence[Tensor], canvas: Size | None = None) -> tuple[ImageBatch, list[Size]]:
        """Turn images into a batch.

        Args:
            images: each `Tensor[3, H, W]`, RGB, float in 0..1 or uint8, any strides; or a `Tensor[B, 3, H, W]`.
            canvas: (height, width) of the batch; None: the smallest multiples of `size_divisible` that hold all images.

        Returns:
            The batch, in the model's dtype, and each image's (height, width) in it.

        Raises:
            TypeError: not a list of tensors.
            ValueError: no image, or one of another shape or dtype, or larger than `canvas` after resizing.
        """
        check_images(images)
        if not self._warned and not torch.compiler.is_compiling():
            self._warn(images)
        sizes = [self._new_size(image) for image in images]
        canvas = self._canvas(sizes, canvas)
        device, rule = self.device_marker.device, RESIZE_RULES[self.config.resize]
        moved = [image.to(device, non_blocking=True) for image in images]
        if rule.pillow:
            moved = [pillow_resize(image, size) for image, size in zip(moved, sizes, strict=True)]
        pixels = image_batch(
            moved, sizes, canvas, self.config.mean, self.config.std,
            swap=self.config.channel_order == "bgr", rounded=rule.rounded, dtype=self.device_marker.dtype,
        )  # fmt: skip
        return ImageBatch(pixels, _upload(sizes, device)), sizes

    def _warn(self, images: Sequence[Tensor]) -> None:
        """Once, of levels that cannot be meant; not of those on a GPU, for which the host would have to wait."""
        for row, image in enumerate(images):
            if image.device.type == "cpu" and image.is_floating_point() and (wrong := beyond_levels(image)):
                self._warned = True
                warnings.warn(f"images[{row}]: {wrong}", UserWarning, stacklevel=2)
                return

    def targets(self, targets: Sequence[dict[str, Tensor]], before: Sequence[Size], after: Sequence[Size]) -> Targets:
        """Scale ground-truth boxes from the users' images (`before`) to the batch (`after`) and pad them."""
        device = self.device_marker.device
        maps = self.maps_to_batch(before, after, device)
        boxes = [
            into_batch(target["boxes"].to(device, torch.float32))
            for target, into_batch in zip(targets, maps, strict=True)
        ]
        return pad_targets(boxes, [target["labels"].to(device) for target in targets])

    def detections(self, detections: Detections, before: Sequence[Size], after: Sequence[Size]) -> list[dict]:
        """Cut a padded result into one dict per image, boxes in the users' images' pixels.

        The only place of inference that waits for the device: the counts must be known.
        """
        maps = self.maps_to_images(before, after, detections.boxes.device)
        return [
            {
                "boxes": maps[row](detections.boxes[row, :count]),
                "labels": detections.labels[row, :count],
                "scores": detections.scores[row, :count],
            }
            for row, count in enumerate(detections.count.tolist())
        ]

    def _new_size(self, image: Tensor) -> Size:
        sides = self.config.min_size
        side = sides[int(torch.randint(len(sides), ()))] if self.training and len(sides) > 1 else sides[-1]
        height, width = RESIZE_RULES[self.config.resize].size(
            (image.shape[1], image.shape[2]), side, self.config.max_size
        )
        return max(1, height), max(1, width)

    def _canvas(self, sizes: Sequence[Size], canvas: Size | None) -> Size:
        if canvas is None:
            step = self.config.size_divisible
            height, width = (math.ceil(max(extent) / step) * step for extent in zip(*sizes, strict=True))
            return height, width
        for row, (height, width) in enumerate(sizes):
            if height > canvas[0] or width > canvas[1]:
                raise ValueError(
                    f"images[{row}] is {height} x {width} pixels (height x width) after resizing and does not fit into "
                    f"the canvas of {canvas[0]} x {canvas[1]}: give a larger canvas"
                )
        return canvas

    def maps_to_batch(self, before: Sequence[Size], after: Sequence[Size], device: torch.device) -> list[BoxMap]:
        """For each image the map that carries boxes from it (size `before`) into the batch (size `after`).

        The only way into the batch's pixels: plain ratios are wrong for `legacy_boxes`.  With those a box is at least
        one pixel wide and high in the batch, as in the source, whose boxes end no earlier than at their first pixel.
        """
        return self._box_maps(before, after, device, min_side=1.0 if self.legacy_boxes else 0.0)

    def maps_to_images(self, before: Sequence[Size], after: Sequence[Size], device: torch.device) -> list[BoxMap]:
        """The way back: from the batch to the users' images; the arguments are those of `maps_to_batch`."""
        return self._box_maps(after, before, device, min_side=0.0)

    def _box_maps(
        self, old: Sequence[Size], new: Sequence[Size], device: torch.device, min_side: float
    ) -> list[BoxMap]:
        ratios = [(to[1] / of[1], to[0] / of[0]) for of, to in zip(old, new, strict=True)]
        keep = 1 if self.legacy_boxes else 0
        rows = [[x, y, x, y, 0, 0, keep * (1 - x), keep * (1 - y)] for x, y in ratios]
        scale, shift = _upload(rows, device).split(4, dim=1)
        return [BoxMap(scale[row], shift[row], min_side) for row in range(len(rows))]


def check_images(images: Sequence[Tensor]) -> None:
    """Refuse what is not an image, and say how to convert it.

    Raises:
        TypeError: not a list of tensors.
        ValueError: no image, or one of another shape or dtype.
    """
    if isinstance(images, Tensor) and images.dim() != 4:
        raise ValueError(
            f"images: expected a list of Tensor[3, H, W], or a Tensor[B, 3, H, W], got shape {tuple(images.shape)}"
        )
    if not isinstance(images, (Tensor, list, tuple)):
        raise TypeError(f"images: expected a list of Tensor[3, H, W], got {type(images).__name__}{_conversion(images)}")
    if len(images) == 0:
        raise ValueError("images: expected at least one image, got an empty list")
    for row, image in enumerate(images):
        if not isinstance(image, Tensor):
            raise TypeError(
                f"images[{row}]: expected a Tensor[3, H, W], got {type(image).__name__}{_conversion(image)}"
            )
        if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise ValueError(
                f"images[{row}]: expected a Tensor[3, H, W], got shape {tuple(image.shape)}{_hint(image.shape)}"
            )
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise ValueError(f"images[{row}]: expected uint8 or a floating dtype in 0..1, got {image.dtype}")


def _conversion(image: object) -> str:
    if hasattr(image, "convert"):  # a PIL image
        image = "numpy.array(image.convert('RGB'))"
    elif hasattr(image, "__array__"):
        image = "array"
    else:
        return ""
    return f"; torch.from_numpy({image}).permute(2, 0, 1) makes one of RGB pixels [H, W, 3]"


def _hint(shape: torch.Size) -> str:
    """What may have gone wrong with an image of this shape."""
    if len(shape) == 3 and shape[-1] == 3:
        return ": image.permute(2, 0, 1) brings the channels to the front"
    if len(shape) == 2 or shape[:1] == (1,):
        return ": image.expand(3, -1, -1) makes three channels of one"
    if len(shape) == 3 and shape[0] == 4:
        return ": image[:3] leaves out the fourth channel"
    return ""


def beyond_levels(image: Tensor) -> str:
    """What is wrong with a floating image's range of values; empty if nothing is.  Looks at a sample of the pixels."""
    low, high = torch.aminmax(image.detach()[:, :: max(1, image.shape[1] // 32), :: max(1, image.shape[2] // 32)])
    if high <= 2 and low >= -1:  # what augmentations may well do
        return ""
    return (
        f"floating images are taken as levels in 0..1, and this one has some from {float(low):g} to {float(high):g}: "
        "divide levels of 0..255 by 255 or pass them as uint8, and leave the normalisation to the model"
    )


def _upload(rows: Sequence[Sequence[float]], device: torch.device) -> Tensor:
    """Numbers as float32 on `device`; through pinned memory, so that the host need not wait for a GPU."""
    values = torch.tensor(rows, dtype=torch.float32, pin_memory=device.type == "cuda")
    return values.to(device, non_blocking=True)


def pillow_resize(image: Tensor, size: Size) -> Tensor:
    """Resize as Pillow's bilinear filter does: antialiased, across and then down, rounded to levels after each.

    On the CPU the result is Pillow's but for a rare level.  On a GPU, and where a gradient is wanted, sums that lie
    beside a half may fall the other way: where many do, as between sizes of a simple ratio, it is up to two levels.

    Args:
        image: `Tensor[3, H, W]`, uint8, or floating in 0..1, which is rounded to levels first.
        size: (height, width).

    Returns:
        `Tensor[3, *size]`: uint8; float32 in 0..1 where a gradient is wanted.
    """
    levels = image if image.dtype == torch.uint8 else RoundLevels.apply(image.to(torch.float32) * 255)
    differentiable = levels.requires_grad
    if image.device.type == "cpu" and not differentiable:
        return interpolate(levels.to(torch.uint8)[None], size, mode="bilinear", antialias=True)[0]
    levels = levels.to(torch.float32)[None]
    for step in ((image.shape[1], size[1]), size):
        levels = RoundLevels.apply(interpolate(levels, step, mode="bilinear", antialias=True))
    return levels[0] / 255 if differentiable else levels[0].to(torch.uint8)


# ---------------------------------------------------------------------------------------------
# How projects resize


class ResizeRule(NamedTuple):
    """How a project resizes."""

    size: Callable[[Size, int, int], Size]
    """(height, width), short side, cap of the long side -> new (height, width)."""
    pillow: bool
    """Antialiased and rounded by Pillow."""
    rounded: bool
    """Rounded to levels though not by Pillow."""


def torchvision_size(size: Size, side: int, longest: int) -> Size:
    factor = min(side / min(size), longest / max(size))
    return math.floor(size[0] * factor), math.floor(size[1] * factor)


def detectron2_size(size: Size, side: int, longest: int) -> Size:
    factor = side / min(size)
    exact = (side, factor * size[1]) if size[0] < size[1] else (factor * size[0], side)
    if max(exact) > longest:
        cap = longest / max(exact)
        exact = (exact[0] * cap, exact[1] * cap)
    return int(exact[0] + 0.5), int(exact[1] + 0.5)


def mmdet_size(size: Size, side: int, longest: int) -> Size:
    # Of `side` and `longest` the larger limits the long side, whatever their order.
    factor = min(max(side, longest) / max(size), min(side, longest) / min(size))
    return int(size[0] * factor + 0.5), int(size[1] * factor + 0.5)


def maskrcnn_benchmark_size(size: Size, side: int, longest: int) -> Size:
    short, long = min(size), max(size)
    if long / short * side > longest:
        side = round(longest * short / long)
    if side == 0:  # where the source fails
        return (1, longest) if size[0] < size[1] else (longest, 1)
    return (int(side * size[0] / size[1]), side) if size[1] < size[0] else (side, int(side * size[1] / size[0]))


RESIZE_RULES = {
    "torchvision": ResizeRule(torchvision_size, pillow=False, rounded=False),
    "detectron2": ResizeRule(detectron2_size, pillow=True, rounded=False),
    "mmdet": ResizeRule(mmdet_size, pillow=False, rounded=True),
    "maskrcnn_benchmark": ResizeRule(maskrcnn_benchmark_size, pillow=True, rounded=False),
}
