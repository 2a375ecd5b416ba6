"""Inputs of RoIAlign: pyramids of 800x1344 images, strides 4 to 32, 256 channels, and boxes like proposals."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
import torchvision
from floors import touched
from inputs import DEVICE, generator, rpn_boxes
from torch import Tensor

from doublehead.ops.roi_align import reference
from doublehead.ops.roi_align.level_rules import LEVEL_RULES
from doublehead.ops.roi_align.pooling import Pooling

NAMES = ["0", "1", "2", "3"]
STRIDES = (4, 8, 16, 32)
SCALES = tuple(1 / stride for stride in STRIDES)
LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}


class Problem:
    """Features, boxes and the gradient of the output, full size or small."""

    def __init__(
        self,
        full: bool,
        layout: str = "channels_last",
        output_size: int = 7,
        boxes: int = 512,
        dtype: torch.dtype = torch.float32,
        images: int = 1,
    ):
        self.image, self.channels = ((800, 1344), 256) if full else ((128, 192), 24)
        self.count = boxes if full else 24
        self.images, self.output_size, self.layout, self.dtype = images, output_size, layout, dtype
        random = generator(0)

        def normal(*shape: int) -> Tensor:
            x = torch.randn(*shape, generator=random, device=DEVICE).to(dtype)
            return x.contiguous(memory_format=LAYOUTS[layout])

        self.features = [
            normal(images, self.channels, -(-self.image[0] // step), -(-self.image[1] // step)).requires_grad_()
            for step in STRIDES
        ]
        self.boxes = [rpn_boxes(self.count, image_size=self.image, seed=image)[0] for image in range(images)]
        self.rois = torch.cat([torch.nn.functional.pad(b, (1, 0), value=i) for i, b in enumerate(self.boxes)])
        self.grad = normal(len(self.rois), self.channels, output_size, output_size)

    def module(self, kind) -> Callable[[], Tensor]:
        """torchvision's module, or ours, which has its interface."""
        pool = kind(NAMES, self.output_size, 2)
        sizes = [self.image] * self.images
        boxes, cast = self.boxes, False
        if kind is torchvision.ops.MultiScaleRoIAlign:
            # torchvision pools from features of its boxes' type alone. It has no bfloat16, and no float16 on a CPU:
            # there it pools in float32 and casts, which is also what it does under autocast.
            cast = self.dtype == torch.bfloat16 or (self.dtype == torch.float16 and DEVICE == "cpu")
            boxes = boxes if cast else [b.to(self.dtype) for b in boxes]

        def run() -> Tensor:
            features = [f.float() for f in self.features] if cast else self.features
            return pool(dict(zip(NAMES, features, strict=True)), boxes, sizes).to(self.dtype)

        return run

    def reference(self, compiled: bool) -> Callable[[], Tensor]:
        size = (self.output_size, self.output_size)
        pool = torch.compile(reference.multiscale_roi_align) if compiled else reference.multiscale_roi_align
        pooling = Pooling(SCALES, (1.0,), size, 2, False, 224.0, 4, *LEVEL_RULES["torchvision"])
        return lambda: pool(self.features, self.rois, pooling)[0]

    def mmcv(self) -> Callable[[], Tensor] | str:
        """mmcv's operator level by level, as MMDetection's extractor calls it."""
        try:
            from mmcv.ops import roi_align
        except ImportError:
            return "mmcv is not installed"
        levels, size = self.levels(), self.output_size

        def pool() -> Tensor:
            output = self.features[0].new_zeros(len(self.rois), self.channels, size, size)
            for level, (feature, scale) in enumerate(zip(self.features, SCALES, strict=True)):
                here = (levels == level).nonzero()[:, 0]
                output[here] = roi_align(feature, self.rois[here], (size, size), scale, 2, "avg", False)
            return output

        return pool

    def levels(self) -> Tensor:
        """The pyramid level of every RoI, torchvision's rule: `Tensor[K]` in 0 .. 3."""
        side = torchvision.ops.box_area(self.rois[:, 1:]).sqrt()
        return (4 + torch.log2(side / 224) + 1e-6).floor().clamp(2, 5).long() - 2

    def forward_bytes(self) -> int:
        """Every pixel that any box touches once, and the output. (The boxes' own 20 bytes are not counted.)"""
        levels, pixels = self.levels(), 0
        for level, scale in enumerate(SCALES):
            height, width = self.features[level].shape[-2:]
            for image in range(self.images):
                here = self.rois[(levels == level) & (self.rois[:, 0] == image), 1:].double().cpu()
                if len(here) == 0:
                    continue
                rows = touched(here[:, 1] * scale, here[:, 3] * scale, self.output_size, height)
                columns = touched(here[:, 0] * scale, here[:, 2] * scale, self.output_size, width)
                pixels += int((rows.T.float() @ columns.float() > 0).sum())
        return (pixels * self.channels + self.grad.numel()) * self.dtype.itemsize

    def backward_bytes(self) -> int:
        """The output's gradient once, and the features' gradient once."""
        return (self.grad.numel() + sum(prod(f.shape) for f in self.features)) * self.dtype.itemsize

    def details(self, **more) -> dict:
        return {
            "images": self.images,
            "boxes": self.count,
            "channels": self.channels,
            "image": list(self.image),
            "output_size": self.output_size,
            "layout": self.layout,
            "dtype": str(self.dtype).removeprefix("torch."),
        } | more


def forward(call: Callable[[], Tensor] | str) -> Callable[[], Tensor] | str:
    def run():
        with torch.no_grad():
            return call()

    return run if callable(call) else call


def backward(call: Callable[[], Tensor] | str, problem: Problem) -> Callable[[], tuple[Tensor, ...]] | str:
    """The backward alone: the graph is made once and kept."""
    if not callable(call):
        return call
    output = call()
    return lambda: torch.autograd.grad(output, problem.features, problem.grad, retain_graph=True)


def both(call: Callable[[], Tensor] | str, problem: Problem) -> Callable[[], tuple[Tensor, ...]] | str:
    """Forward and backward, as a training step has them."""
    if not callable(call):
        return call
    return lambda: torch.autograd.grad(call(), problem.features, problem.grad)


def check(actual, expected) -> None:
    """Against torchvision; the tests hold both against float64."""
    wide = (actual if isinstance(actual, Tensor) else actual[0]).dtype in (torch.float32, torch.float64)
    # In 16 bits each provider rounds in its own places, torchvision's float16 backward after every addition.
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if wide else {"rtol": 0.02, "atol": 0.5}
    torch.testing.assert_close(actual, expected, **tolerance)
