"""RoIAlign on a feature pyramid: 800x1344 images, levels of stride 4 to 32, 256 channels, sampling ratio 2.

Every provider pools the same boxes, as a region proposal network gives them, from the same features. With
--benchmark-disable the image and the number of boxes are small, and the results are compared all the same.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from inputs import DEVICE

pytest.importorskip("torchvision")

import torchvision  # noqa: E402
from pyramid import LAYOUTS, NAMES, SCALES, Problem, backward, both, check, forward  # noqa: E402

from doublehead.ops import MultiScaleRoIAlign, multiscale_roi_align  # noqa: E402

on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="a case for a GPU; on a CPU the peer would take minutes")


def compare_all(compare, problem: Problem, case: str, way: Callable, bytes_moved: int, compiled: bool) -> None:
    """torchvision, the definition, mmcv and ours; `way` makes a forward, a backward or both of a provider's call."""
    if problem.images == 1:
        eager = way(problem.reference(compiled=False))
    else:
        eager = "takes much memory: only measured with one image"
    compiles = compare.measures and compare.full and compiled
    compare(
        op="roi_align",
        case=case,
        providers={
            "torchvision": way(problem.module(torchvision.ops.MultiScaleRoIAlign)),
            "reference": eager,
            "reference compiled": (
                way(problem.reference(compiled=True))
                if compiles
                else "takes long to compile: only measured at 7x7, with --full"
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


BATCHES = [
    *((images, boxes, 7, dtype, way) for images, boxes in ((1, 1000), (2, 512), (16, 512))
      for dtype in (torch.float32, torch.bfloat16) for way in ("forward", "backward")),
    (2, 512, 7, torch.float16, "both"),
    (2, 512, 14, torch.bfloat16, "both"),
    (16, 1000, 7, torch.bfloat16, "both"),
]  # fmt: skip
"""Every number of images and boxes, size, dtype and way at least once: all their combinations would take an hour."""


@on_gpu
@pytest.mark.parametrize("images, boxes, output_size, dtype, way", BATCHES)
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
