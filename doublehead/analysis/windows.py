"""Sliding windows around every object: predefined proposals whose IoUs with it fill [0, 1] (PAPER section 3.1)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from doublehead.data import Target
from doublehead.ops.boxes import box_iou

VERSION = 1
"""Version of the sampling rule; statistics of different versions are never merged."""
SIZES, OFFSETS = 7, 17
"""Number of grid cells for each side length and for each offset."""
WINDOWS = SIZES**2 * OFFSETS**2
"""Number of windows for each object, 14,161; the paper has about 14,000."""
LARGEST = 4.0
"""A window's side is 1/4 to 4 times the object's."""
MARGIN = 0.03
"""Offsets end this far, relatively, before window and object no longer overlap."""
CROWDING = 4
"""Exponent of the grid's coordinates for sizes and offsets; it concentrates windows around the object.  On a uniform
grid no window would reach an IoU of 0.95.  With 4, each of 20 IoU bins holds over 1 % of the windows, for any object
anywhere in the image (typically 2 to 6 %)."""
BINS = 20


class ObjectWindows(NamedTuple):
    """All windows of all G objects of an image, K = G * WINDOWS."""

    boxes: Tensor
    """`Tensor[K, 4]`, float32, in the image's pixels."""
    objects: Tensor
    """`Tensor[K]`, int64: the object of each window, 0 .. G - 1."""
    ious: Tensor
    """`Tensor[K]`, float32, in [0, 1]: the IoU of each window with its object."""


def object_windows(image: Tensor, target: Target, seed: int) -> ObjectWindows:
    """The windows of an image `Tensor[3, H, W]`, on its device; see `sliding_windows`."""
    truth = target["boxes"].to(image.device)
    windows = sliding_windows(truth, (image.shape[-2], image.shape[-1]), (seed, target["image_id"]))
    ious = box_iou(windows, truth[:, None])[..., 0].clamp(0, 1)  # rounding may exceed 1 by an ulp
    objects = torch.arange(len(truth), device=image.device).repeat_interleave(WINDOWS)
    return ObjectWindows(windows.flatten(0, 1), objects, ious.flatten())


def iou_bins(ious: Tensor) -> Tensor:
    """The index of each IoU's bin among `BINS` uniform bins of [0, 1]: `Tensor[K]` -> `Tensor[K]` int64."""
    return (ious * BINS).long().clamp(max=BINS - 1)


def sliding_windows(boxes: Tensor, size: tuple[int, int], seed: tuple[int, int]) -> Tensor:
    """Windows of different sizes and positions around every object.

    The grid covers widths, heights and offsets relative to the object.  One window is drawn at random in each cell
    (stratified jitter) and clipped to the image; the middle one is the object's own box.  Every window overlaps its
    object and has a positive area.

    Args:
        boxes: `Tensor[G, 4]`: the objects, in pixels of the image, with sides of at least 0.1.
        size: (height, width) of the image.
        seed: (seed, image id); the windows depend on these and the boxes alone.

    Returns:
        `Tensor[G, WINDOWS, 4]`, float32, on `boxes`' device.
    """
    grid = _jittered_grid(len(boxes), seed).to(boxes.device)
    truth = boxes.double()
    low, sides = truth[:, None, :2], (truth[:, 2:] - truth[:, :2])[:, None]
    lengths = sides * LARGEST ** grid[..., :2]
    reach = (1 - MARGIN) * (sides + lengths) / 2
    centres = low + sides / 2 + reach * grid[..., 2:]
    windows = torch.cat((centres - lengths / 2, centres + lengths / 2), dim=-1).float()
    windows[:, WINDOWS // 2] = boxes
    height, width = size
    limits = torch.tensor([width, height, width, height], dtype=windows.dtype, device=windows.device)
    return torch.minimum(windows.clamp(min=0), limits)


def _jittered_grid(objects: int, seed: tuple[int, int]) -> Tensor:
    """`Tensor[G, WINDOWS, 4]` float64, coordinates in [-1, 1], concentrated around 0."""
    draw = np.random.default_rng([number % 2**64 for number in seed])
    counts = np.array([SIZES, SIZES, OFFSETS, OFFSETS])
    cells = np.indices(counts).reshape(4, WINDOWS).T
    even = 2 * (cells + draw.random((objects, WINDOWS, 4))) / counts - 1
    return torch.from_numpy(np.sign(even) * np.abs(even) ** CROWDING)
