"""RoIAlign on a feature pyramid: 800x1344 image, levels of stride 4 to 32, 256 channels, sampling ratio 2.

Every provider pools the same boxes, as a region proposal network gives them, from the same features. With
--benchmark-disable the image and the number of boxes are small, and the results are compared all the same.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness import rpn_boxes
from torch import Tensor

from doublehead.ops import MultiScaleRoIAlign, multiscale_roi_align
from doublehead.ops.roi_align import reference

torchvision = pytest.importorskip("torchvision")

NAMES = ["0", "1", "2", "3"]
SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}


class Problem:
    """Features, boxes and the gradient of the output, full size or small."""

    def __init__(self, full: bool, layout: str, output_size: int, boxes: int = 512, dtype: torch.dtype = torch.float32):
        self.image, self.channels = ((800, 1344), 256) if full else ((128, 192), 24)
        self.count = boxes if full else 24
        self.output_size = output_size
        torch.manual_seed(0)
        self.features = [
            torch.randn(1, self.channels, -(-self.image[0] // step), -(-self.image[1] // step), dtype=dtype)
            .contiguous(memory_format=LAYOUTS[layout])
            .requires_grad_()
            for step in (4, 8, 16, 32)
        ]
        self.boxes = rpn_boxes(self.count, image_size=self.image)[0]
        self.grad = torch.randn(self.count, self.channels, output_size, output_size, dtype=dtype)
        self.grad = self.grad.contiguous(memory_format=LAYOUTS[layout])

    def module(self, kind) -> Callable[[], Tensor]:
        pool = kind(NAMES, self.output_size, 2)
        return lambda: pool(dict(zip(NAMES, self.features, strict=True)), [self.boxes], [self.image])

    def reference(self, compiled: bool) -> Callable[[], Tensor]:
        rois = torch.nn.functional.pad(self.boxes, (1, 0))
        size = (self.output_size, self.output_size)
        pool = torch.compile(reference.multiscale_roi_align) if compiled else reference.multiscale_roi_align
        return lambda: pool(self.features, rois, SCALES, (1.0,), size, 2, False, 224.0, 4, 0)[0]

    def details(self, **more) -> dict:
        return {
            "boxes": self.count,
            "channels": self.channels,
            "image": list(self.image),
            "output_size": self.output_size,
            "dtype": str(self.grad.dtype).removeprefix("torch."),
        } | more


def forward(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run():
        with torch.no_grad():
            return call()

    return run


def backward(call: Callable[[], Tensor], problem: Problem) -> Callable[[], tuple[Tensor, ...]]:
    """The backward alone: the graph is made once and kept."""
    output = call()
    return lambda: torch.autograd.grad(output, problem.features, problem.grad, retain_graph=True)


def check(actual, expected) -> None:
    """Against torchvision in float32; the tests hold both against float64."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("output_size", [7, 14])
def test_forward(compare, output_size, layout):
    problem = Problem(compare.measures, layout, output_size)
    compiled = compare.measures and output_size == 7
    compare(
        op="roi_align",
        case=f"forward {output_size}x{output_size} {layout}",
        providers={
            "torchvision": forward(problem.module(torchvision.ops.MultiScaleRoIAlign)),
            "reference": forward(problem.reference(compiled=False)),
            "reference compiled": (
                forward(problem.reference(compiled=True)) if compiled else "takes long to compile: only measured at 7x7"
            ),
            "doublehead": forward(problem.module(MultiScaleRoIAlign)),
        },
        check=check,
        details=problem.details(layout=layout),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("output_size", [7, 14])
def test_backward(compare, output_size, layout):
    problem = Problem(compare.measures, layout, output_size)
    compiled = compare.measures and output_size == 7
    compare(
        op="roi_align",
        case=f"backward {output_size}x{output_size} {layout}",
        providers={
            "torchvision": backward(problem.module(torchvision.ops.MultiScaleRoIAlign), problem),
            "reference": backward(problem.reference(compiled=False), problem),
            "reference compiled": (
                backward(problem.reference(compiled=True), problem)
                if compiled
                else "takes long to compile: only measured at 7x7"
            ),
            "doublehead": backward(problem.module(MultiScaleRoIAlign), problem),
        },
        check=check,
        details=problem.details(layout=layout),
    )


def test_forward_two_box_scales(compare):
    """Double-Head-Ext pools every box twice, as it is and 1.3 times as large: one call here, two there."""
    problem = Problem(compare.measures, "channels_last", 7)
    rois = torch.nn.functional.pad(problem.boxes, (1, 0))
    centres, halves = (
        (problem.boxes[:, :2] + problem.boxes[:, 2:]) / 2,
        (problem.boxes[:, 2:] - problem.boxes[:, :2]) / 2,
    )
    expanded = torch.cat([centres - 1.3 * halves, centres + 1.3 * halves], 1)
    pool = torchvision.ops.MultiScaleRoIAlign(NAMES, 7, 2)
    wider = torchvision.ops.MultiScaleRoIAlign(NAMES, 7, 2, canonical_scale=224 * 1.3)
    x = dict(zip(NAMES, problem.features, strict=True))
    compare(
        op="roi_align",
        case="forward 7x7 channels_last, box scales 1.0 and 1.3",
        providers={
            "torchvision": forward(
                lambda: [pool(x, [problem.boxes], [problem.image]), wider(x, [expanded], [problem.image])]
            ),
            "doublehead": forward(
                lambda: multiscale_roi_align(problem.features, rois, 7, spatial_scales=SCALES, box_scales=(1.0, 1.3))
            ),
        },
        check=check,
        details=problem.details(layout="channels_last", box_scales=[1.0, 1.3]),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_bfloat16(compare, layout):
    problem = Problem(compare.measures, layout, 7, dtype=torch.bfloat16)
    compare(
        op="roi_align",
        case=f"forward 7x7 {layout} bfloat16",
        providers={
            "reference": forward(problem.reference(compiled=False)),
            "torchvision": "has no bfloat16",
            "doublehead": forward(problem.module(MultiScaleRoIAlign)),
        },
        check=lambda actual, expected: torch.testing.assert_close(actual, expected),
        details=problem.details(layout=layout),
    )
