"""RoIAlign's CUDA kernels, run on the CPU by the emulator, against the reference in float64.

What a GPU would be needed for, speed and what only real concurrency shows, is in test_roi_align_gpu.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from doublehead.ops.roi_align import reference
from doublehead.ops.roi_align.level_rules import LEVEL_RULES
from doublehead.ops.roi_align.pooling import Pooling
from tests.cuda_emulation.build import IN_ORDER, ORDERS, every_order, open_emulated
from tests.support.emulated_roi_align import DTYPES, LAYOUTS, backward, call, forward
from tests.support.guarded_memory import guarded, run_apart
from tests.support.roi_align_cases import TORCHVISION
from tests.support.roi_align_cases import make_rois as boxes_of_all_sizes

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])


def exact(function, tensors, rois, *arguments) -> list[Tensor]:
    """The reference in float64."""
    return function([t.double() for t in tensors], rois.double(), *arguments)


def make_features(shapes, dtype=torch.float32, layout=torch.contiguous_format, seed=0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(dtype).contiguous(memory_format=layout) for s in shapes]


def make_rois(count, images, height, width, dtype=torch.float32) -> Tensor:
    """Boxes of all sizes with corners on a grid of 1/64 pixel: float32 and float64 then read the same pixels."""
    rois = boxes_of_all_sizes(count, images, height, width)
    rois[:, 1:] = (rois[:, 1:] * 64).round() / 64
    return rois.to(dtype)


def assert_close(actual: Tensor, plain: Tensor, exactly: Tensor, what="") -> None:
    """The error is at most twice that of the reference in the same dtype (or some rounding of the largest value)."""
    assert actual.isfinite().all(), f"{what}: not every element was written"
    error, allowed = (actual.double() - exactly).abs().max(), 2 * (plain.double() - exactly).abs().max()
    roundings = 64 if actual.dtype == torch.float64 else 1  # in float64 the reference is the exact result
    rounding = roundings * torch.finfo(actual.dtype).eps * exactly.abs().max()
    assert error <= torch.maximum(allowed, rounding), f"{what}: error {error:.3e}, allowed {allowed:.3e}"


def check_output(features, rois, *pooling, order=IN_ORDER, no_room=False) -> list[Tensor]:
    outputs = forward(features, rois, *pooling, order=order, no_room=no_room)
    plain = reference.multiscale_roi_align(features, rois, Pooling(*pooling))
    for s, expected in enumerate(exact(reference.multiscale_roi_align, features, rois, Pooling(*pooling))):
        assert_close(outputs[s], plain[s], expected, f"output {s}")
    return outputs


def check(features, rois, *pooling, order=IN_ORDER, no_room=False) -> tuple[list[Tensor], list[Tensor]]:
    """Forward and backward against the reference; returns both results."""
    outputs = check_output(features, rois, *pooling, order=order, no_room=no_room)
    grads = make_features([o.shape for o in outputs], features[0].dtype, seed=1)
    last = reference.is_channels_last(features[0])
    sizes = [*features[0].shape[:2], *(side for f in features for side in f.shape[2:])]
    results = backward(grads, rois, sizes, last, *pooling, order=order, no_room=no_room)
    plain = reference.multiscale_roi_align_backward(grads, rois, sizes, last, Pooling(*pooling))
    for level, expected in enumerate(
        exact(reference.multiscale_roi_align_backward, grads, rois, sizes, last, Pooling(*pooling))
    ):
        assert_close(results[level], plain[level], expected, f"gradient {level}")
    return outputs, results


def packed(arguments) -> tuple:
    """The backward's arguments after the tensors, flat -> for the reference."""
    sizes, channels_last, *pooling = arguments
    return sizes, channels_last, Pooling(*pooling)


def single(output_size, sampling_ratio, aligned, scale=0.5):
    return [scale], [1.0], output_size, sampling_ratio, aligned, 224.0, 4, *TORCHVISION


# ---------------------------------------------------------------------------------------------
# Against the reference


@dtypes
@layouts
@pytest.mark.parametrize(
    ("channels", "output_size"), [(1, (7, 7)), (3, (3, 5)), (40, (14, 14)), (72, (20, 2)), (36, (1, 9))], ids=str
)
def test_output_and_gradient(channels, output_size, layout, dtype):
    features = make_features([(2, channels, 21, 38)], dtype, layout)
    rois = make_rois(6, 2, 42, 76, torch.float64 if dtype == torch.float64 else torch.float32)
    for sampling_ratio, aligned in ((2, False), (0, True)):
        check(features, rois, *single(output_size, sampling_ratio, aligned))


@layouts
@every_order
def test_pyramid_with_two_box_scales_in_any_order_of_threads(order, layout):
    shapes = [(2, 20, 40, 31), (2, 20, 20, 16), (2, 20, 10, 8), (2, 20, 5, 1)]
    features, rois = make_features(shapes, layout=layout), make_rois(30, 2, 160, 124)
    rois[3, 0], rois[4, 0], rois[5, 1], rois[6, 1:] = 2, -1, torch.nan, torch.tensor([50.0, 20, 40, 90])
    pooling = [1 / 4, 1 / 8, 1 / 16, 1 / 32], [1.0, 1.3], (7, 7), 2, False, 56.0, 3, *TORCHVISION
    first = check(features, rois, *pooling, order=IN_ORDER)
    for ours, expected in zip(check(features, rois, *pooling, order=order), first, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    for output in first[0]:
        assert not output[3:7].any()


@layouts
@pytest.mark.parametrize("rule", LEVEL_RULES.values(), ids=LEVEL_RULES)
def test_level_rules(rule, layout):
    sides = torch.tensor([27.9, 28.0, 28.1, 55.9, 56.0, 56.1, 111.9, 112.0, 112.1, 500.0, 0.0])
    rois = torch.stack([sides * 0, sides * 0 + 3, sides * 0 + 4, sides + 3, sides + 4], 1)
    features = make_features([(1, 4, 32, 32), (1, 4, 16, 16), (1, 4, 8, 8)], layout=layout)
    check(features, rois, [1 / 4, 1 / 8, 1 / 16], [1.0, 1.3], (3, 3), 2, False, 56.0, 3, *rule)


@layouts
@pytest.mark.parametrize("sampling_ratio", [-1, 1, 3, 5])
@pytest.mark.parametrize("aligned", [False, True])
def test_sampling(aligned, sampling_ratio, layout):
    features = make_features([(1, 9, 33, 70)], torch.float64, layout)
    rois = make_rois(9, 1, 33, 70, torch.float64)
    rois[0, 1:] = torch.tensor([-40.0, -30, 200, 90])  # larger than the map
    check(features, rois, *single((5, 4), sampling_ratio, aligned, 1.0))


@layouts
def test_without_room_for_the_weights(layout):
    features, rois = make_features([(2, 19, 21, 38)], layout=layout), make_rois(6, 2, 42, 76)
    for sampling_ratio in (2, 0):
        check(features, rois, *single((7, 6), sampling_ratio, True), no_room=True)


@layouts
def test_window_larger_than_shared_memory(layout):
    """The planar forward combines rows in parts; boxes too wide for the tables are pooled sample by sample."""
    features = make_features([(1, 3, 5, 1000)], layout=layout)
    rois = torch.tensor([[0.0, 0, 0, 700, 5], [0, 10, -2, 990, 4]])
    for output_size in ((7, 7), (5, 1)):
        check_output(features, rois, *single(output_size, 0, False, 1.0))
    check_output(make_features([(1, 35, 30, 700)], layout=layout), rois, *single((14, 3), 0, True, 1.0))


@layouts
def test_more_bins_than_the_weights_of_a_batch_hold(layout):
    features, rois = make_features([(1, 4, 12, 40)], layout=layout), make_rois(3, 1, 12, 40)
    check(features, rois, *single((35, 70), 2, False, 1.0))
    check_output(features, rois, *single((300, 260), 1, True, 1.0))  # nor do the forward's tables


@layouts
@every_order
def test_many_boxes_on_one_object(order, layout):
    """More boxes than there are threads to list them and to look for them, and than a batch holds."""
    generator = torch.Generator().manual_seed(5)
    boxes = torch.tensor([1.0, 2, 8, 7]) + torch.randint(-64, 64, (1100, 4), generator=generator) / 64
    rois = torch.nn.functional.pad(boxes, (1, 0))
    rois[torch.arange(1100) % 4 > 0, 0] = -1  # no image
    grads = make_features([(1100, 2, 3, 3)], seed=1)
    arguments = [1, 2, 10, 9], layout == LAYOUTS[1], *single((3, 3), 2, False, 1.0)
    (actual,) = backward(grads, rois, *arguments, order=order)
    (plain,) = reference.multiscale_roi_align_backward(grads, rois, *packed(arguments))
    (expected,) = exact(reference.multiscale_roi_align_backward, grads, rois, *packed(arguments))
    assert_close(actual, plain, expected)


@pytest.mark.parametrize(
    ("channels", "dtype"), [(8, torch.float32), (264, torch.bfloat16), (6, torch.float64)], ids=str
)
def test_a_dense_tile_is_summed_in_parts_in_a_fixed_order(channels, dtype):
    """More than 1024 boxes in a list; the parts' sums are equal in any order of blocks, to the last bit."""
    count = 1100 if channels == 8 else 60
    generator = torch.Generator().manual_seed(5)
    boxes = torch.tensor([1.0, 2, 12, 7]) + torch.randint(-64, 64, (count, 4), generator=generator) / 64
    rois = torch.nn.functional.pad(boxes, (1, 0)).to(torch.float64 if dtype == torch.float64 else torch.float32)
    grads = make_features([(count, channels, 3, 3)], dtype, LAYOUTS[1], seed=1)
    arguments = [1, channels, 10, 13], True, *single((3, 3), 2, False, 1.0)
    (plain,) = reference.multiscale_roi_align_backward(grads, rois, *packed(arguments))
    (expected,) = exact(reference.multiscale_roi_align_backward, grads, rois, *packed(arguments))
    (first,) = backward(grads, rois, *arguments)
    assert_close(first, plain, expected)
    for order in (ORDERS[1], ORDERS[3]):
        assert torch.equal(backward(grads, rois, *arguments, order=order)[0], first), order


def test_boxes_with_and_without_a_table_of_weights():
    """Adaptive sampling: the kernel for any box takes over from the fast one as soon as one box needs it."""
    narrow, wide = torch.tensor([[0.0, 30, -1, 42, 3], [0, 500, 1, 640, 4]]), torch.tensor([[0.0, 10, 0, 950, 4]])
    arguments = [1, 8, 4, 1000], True, *single((2, 3), 0, True, 1.0)
    for some in (narrow, torch.cat([narrow, wide])):
        grads = make_features([(len(some), 8, 2, 3)], layout=LAYOUTS[1], seed=1)
        (plain,) = reference.multiscale_roi_align_backward(grads, some, *packed(arguments))
        (expected,) = exact(reference.multiscale_roi_align_backward, grads, some, *packed(arguments))
        (actual,) = backward(grads, some, *arguments)
        assert_close(actual, plain, expected)


def test_bins_without_a_pixel_are_zero():
    (features,), rois = make_features([(1, 3, 9, 10)]), torch.tensor([[0.0, 1, -40, 8, 8], [0, -50, 1, 8, 30]])
    check([features], rois, *single((5, 4), 2, False, 1.0))


# ---------------------------------------------------------------------------------------------
# Cases that peers get wrong


@layouts
@pytest.mark.parametrize("sampling_ratio", [2, 0])
@pytest.mark.parametrize("aligned", [False, True])
def test_strange_boxes(aligned, sampling_ratio, layout):
    inf, nan = torch.inf, torch.nan
    boxes = torch.tensor([
        [nan, 1, 5, 5], [1, inf, 5, 5], [1, 1, -inf, 5], [1, 1, 5, nan], [1, 1, 5, inf],
        [9, 9, 3, 3], [9, 3, 12, 2], [5, 5, 5, 5], [5, 5, 9, 5], [-60, -60, -50, -50], [40, 3, 60, 9],
        [3e38, 0, 3.1e38, 5], [-3e38, -3e38, 3e38, 3e38], [-1e9, 0, 10, 10], [3, 3, 1e9, 9], [-3e4, 2, 3e4, 9],
        [-1, -1, 17, 16], [16, 15, 17, 16], [-1e6, -1e6, 1e6, 1e6],
    ])  # fmt: skip
    rois = torch.nn.functional.pad(boxes, (1, 0)).double()
    check(make_features([(1, 6, 16, 17)], torch.float64, layout), rois, *single((7, 3), sampling_ratio, aligned, 1.0))


@layouts
def test_huge_coordinates_in_float32(layout):
    """Adaptive bins beside which pixels are lost in rounding: their weights are then made sample by sample."""
    boxes = torch.tensor([[-1e9, 0, 10, 10], [3, 3, 1e9, 9], [-1e6, -1e6, 1e6, 1e6], [-2e7, 1, 2e7, 9]])
    rois, features = torch.nn.functional.pad(boxes, (1, 0)), make_features([(1, 3, 9, 10)], layout=layout)
    pooling = single((4, 3), 0, False, 1.0)
    (actual,) = forward(features, rois, *pooling)
    (plain,) = reference.multiscale_roi_align(features, rois, Pooling(*pooling))
    torch.testing.assert_close(actual, plain, rtol=1e-4, atol=1e-4)
    grads = make_features([(4, 3, 4, 3)], seed=1)
    arguments = [1, 3, 9, 10], layout == LAYOUTS[1], *pooling
    (actual,) = backward(grads, rois, *arguments)
    (plain,) = reference.multiscale_roi_align_backward(grads, rois, *packed(arguments))
    torch.testing.assert_close(actual, plain, rtol=1e-4, atol=1e-4)


@layouts
@pytest.mark.parametrize("image", [-1.0, 2.0, 1e9, -1e30, torch.nan, torch.inf])
def test_image_that_is_not_there_is_never_read(image, layout):
    features, rois = make_features([(2, 4, 8, 8), (2, 4, 4, 4)], layout=layout), make_rois(3, 2, 16, 16)
    rois[1, 0] = image
    pooling = [0.5, 0.25], [1.0], (3, 3), 2, False, 14.0, 3, *TORCHVISION
    (output,), _ = check(features, rois, *pooling)
    assert not output[1].any()


@layouts
def test_infinite_values_stay_where_they_are(layout):
    (features,), rois = make_features([(1, 18, 40, 40)], layout=layout), torch.tensor([[0.0, 10, 10, 31, 31]])
    pooling = single((7, 7), 2, False, 1.0)
    features[0, 3, 20, 20] = torch.inf
    (output,) = forward([features], rois, *pooling)
    (expected,) = reference.multiscale_roi_align([features], rois, Pooling(*pooling))
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert output.isinf().any() and not output.isnan().any()
    (grad,) = make_features([(1, 18, 7, 7)], seed=1)
    grad[0, 3, 2, 2] = torch.inf
    arguments = [1, 18, 40, 40], layout == LAYOUTS[1], *pooling
    (result,) = backward([grad], rois, *arguments)
    (expected,) = reference.multiscale_roi_align_backward([grad], rois, *packed(arguments))
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert result.isinf().any() and not result.isnan().any()


@layouts
def test_levels_and_images_without_boxes_and_empty_maps(layout):
    features = make_features([(3, 4, 16, 16), (3, 4, 8, 8), (3, 4, 0, 4), (3, 4, 3, 0)], layout=layout)
    pooling = [1 / 4, 1 / 8, 1 / 16, 1 / 32], [1.0], (3, 2), 2, False, 56.0, 3, *TORCHVISION
    rois = torch.tensor([[0.0, 2, 2, 30, 30], [0, 0, 0, 10, 10], [2, 0, 0, 500, 500], [2, 0, 0, 190, 200]])
    outputs = forward(features, rois, *pooling)
    assert outputs[0][:2].all() and not outputs[0][2:].any()
    sizes = [3, 4, 16, 16, 8, 8, 0, 4, 3, 0]
    results = backward(outputs, rois, sizes, layout == LAYOUTS[1], *pooling)
    assert results[0][0].any() and not results[0][1:].any() and not results[1].any()
    (nothing, *_) = backward([outputs[0][:0]], rois[:0], sizes, layout == LAYOUTS[1], *pooling)
    assert torch.equal(nothing, torch.zeros_like(nothing))


@pytest.mark.parametrize("layout", ["sliced", "sliced nhwc", "odd offset"])
def test_strides(layout):
    rois = make_rois(5, 2, 12, 13)
    nhwc = torch.contiguous_format if layout == "sliced" else torch.channels_last
    (features,) = make_features([(2, 16, 20, 20)], layout=nhwc)
    features = features[:, 2:10, 4:16, 5:18] if layout != "odd offset" else features[:, 1:9, 4:16, 5:18]
    check([features], rois, *single((4, 3), 2, False, 1.0))


@layouts
@pytest.mark.parametrize("behind", [True, False], ids=["behind", "before"])
@pytest.mark.parametrize("dtype, channels", [(torch.float32, 33), (torch.bfloat16, 64), (torch.float32, 4)], ids=str)
def test_nothing_beside_the_tensors_is_touched(layout, behind, dtype, channels):
    features = make_features([(2, channels, 21, 35), (2, channels, 11, 18)], dtype, layout)
    rois = make_rois(25, 2, 42, 70)
    pooling = [0.5, 0.25], [1.0, 1.3], (7, 7), 2, True, 56.0, 2, *TORCHVISION
    outputs = make_features([(25, channels, 7, 7)] * 2, dtype, layout)
    maps, pooled, boxes = ([guarded(t, behind) for t in tensors] for tensors in (features, outputs, [rois]))
    last = layout == torch.channels_last
    open_emulated("roi_align.cpp")  # compiled here
    for name in ("run_forward", "run_backward"):
        assert run_apart(lambda name=name: call(name, maps, pooled, *boxes, pooling, last, no_room=False)) == 0
