"""RoIAlign on a feature pyramid: 800x1344 images, levels of stride 4 to 32, 256 channels, sampling ratio 2.

Every provider pools the same boxes, as a region proposal network gives them, from the same features. With
--benchmark-disable the image and the number of boxes are small, and the results are compared all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import pytest
import torch
from inputs import DEVICE, rpn_boxes
from torch import Tensor

from doublehead.ops import MultiScaleRoIAlign, multiscale_roi_align
from doublehead.ops.roi_align import reference

torchvision = pytest.importorskip("torchvision")

NAMES = ["0", "1", "2", "3"]
STRIDES = (4, 8, 16, 32)
SCALES = tuple(1 / stride for stride in STRIDES)
LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="a case for a GPU; on a CPU the peer would take minutes")


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
        torch.manual_seed(0)
        self.features = [
            torch.randn(images, self.channels, -(-self.image[0] // step), -(-self.image[1] // step), dtype=dtype)
            .to(DEVICE, memory_format=LAYOUTS[layout])
            .requires_grad_()
            for step in STRIDES
        ]
        self.boxes = [rpn_boxes(self.count, image_size=self.image, seed=image)[0] for image in range(images)]
        self.rois = torch.cat([torch.nn.functional.pad(b, (1, 0), value=i) for i, b in enumerate(self.boxes)])
        self.grad = torch.randn(len(self.rois), self.channels, output_size, output_size, dtype=dtype)
        self.grad = self.grad.to(DEVICE, memory_format=LAYOUTS[layout])

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
        return lambda: pool(self.features, self.rois, SCALES, (1.0,), size, 2, False, 224.0, 4, 0)[0]

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
        """Every window's pixels once, and the output: what the forward moves if no two boxes share a pixel."""
        scale = torch.tensor(SCALES, device=DEVICE)[self.levels()][:, None]
        extent = torch.tensor(self.image[::-1], device=DEVICE) * scale
        bins = ((self.rois[:, 3:] - self.rois[:, 1:3]) * scale).clamp(min=1) / self.output_size
        first = self.rois[:, 1:3] * scale + bins / 4  # the outermost of two samples a bin
        last = first + bins * (self.output_size - 0.5)
        pixels = (torch.minimum(last.floor() + 2, extent) - first.floor().clamp(min=0)).prod(1).sum()
        return round(float(pixels) * self.channels + self.grad.numel()) * self.dtype.itemsize

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


def compare_all(compare, problem: Problem, case: str, way: Callable, bytes_moved: int, compiled: bool) -> None:
    """torchvision, the definition, mmcv and ours; `way` makes a forward, a backward or both of a provider's call."""
    if problem.images == 1:
        eager = way(problem.reference(compiled=False))
    else:
        eager = "takes much memory: only measured with one image"
    compiles = compare.measures and compiled
    compare(
        op="roi_align",
        case=case,
        providers={
            "torchvision": way(problem.module(torchvision.ops.MultiScaleRoIAlign)),
            "reference": eager,
            "reference compiled": (
                way(problem.reference(compiled=True)) if compiles else "takes long to compile: only measured at 7x7"
            ),
            "mmcv": way(problem.mmcv()),
            "doublehead": way(problem.module(MultiScaleRoIAlign)),
        },
        check=check,
        details=problem.details(),
        bytes_moved=bytes_moved,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("output_size", [7, 14])
def test_forward(compare, output_size, layout):
    problem = Problem(compare.measures, layout, output_size)
    case = f"forward {output_size}x{output_size} {layout}"
    compare_all(compare, problem, case, forward, problem.forward_bytes(), output_size == 7)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("output_size", [7, 14])
def test_backward(compare, output_size, layout):
    problem = Problem(compare.measures, layout, output_size)
    case = f"backward {output_size}x{output_size} {layout}"
    compare_all(
        compare, problem, case, lambda call: backward(call, problem), problem.backward_bytes(), output_size == 7
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_bfloat16(compare, layout):
    problem = Problem(compare.measures, layout, dtype=torch.bfloat16)
    compare_all(compare, problem, f"forward 7x7 {layout} bfloat16", forward, problem.forward_bytes(), False)


@on_gpu
@pytest.mark.parametrize("way", ["forward", "backward", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("output_size", [7, 14])
@pytest.mark.parametrize("boxes", [512, 1000])
@pytest.mark.parametrize("images", [1, 2, 16])
def test_batches(compare, images, boxes, output_size, dtype, way):
    problem = Problem(compare.measures, "channels_last", output_size, boxes, dtype, images)
    ways = {
        "forward": forward,
        "backward": lambda call: backward(call, problem),
        "both": lambda call: both(call, problem),
    }
    moved = {"forward": problem.forward_bytes(), "backward": problem.backward_bytes()}
    name = str(dtype).removeprefix("torch.")
    case = f"{way} {output_size}x{output_size} channels_last {name}, {images} images x {boxes} boxes"
    compare_all(compare, problem, case, ways[way], moved.get(way, sum(moved.values())), False)


def test_forward_two_box_scales(compare):
    """Double-Head-Ext pools every box twice, as it is and 1.3 times as large: one call here, two there."""
    problem = Problem(compare.measures, "channels_last", 7)
    (boxes,), rois = problem.boxes, problem.rois
    centres, halves = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    expanded = torch.cat([centres - 1.3 * halves, centres + 1.3 * halves], 1)
    pool = torchvision.ops.MultiScaleRoIAlign(NAMES, 7, 2)
    wider = torchvision.ops.MultiScaleRoIAlign(NAMES, 7, 2, canonical_scale=224 * 1.3)
    x = dict(zip(NAMES, problem.features, strict=True))
    compare(
        op="roi_align",
        case="forward 7x7 channels_last, box scales 1.0 and 1.3",
        providers={
            "torchvision": forward(lambda: [pool(x, [boxes], [problem.image]), wider(x, [expanded], [problem.image])]),
            "doublehead": forward(
                lambda: multiscale_roi_align(problem.features, rois, 7, spatial_scales=SCALES, box_scales=(1.0, 1.3))
            ),
        },
        check=check,
        details=problem.details(box_scales=[1.0, 1.3]),
    )
