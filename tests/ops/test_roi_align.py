"""roi_align against its reference in float64, and against torchvision: outputs, gradients, and the awkward cases."""

import os

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from doublehead.ops import roi_align
from doublehead.ops.roi_align import reference
from doublehead.ops.roi_align.level_rules import LEVEL_RULES
from doublehead.ops.roi_align.pooling import Pooling
from tests.support.roi_align_cases import (
    CHANNELS_LAST,
    LAYOUTS,
    TORCHVISION,
    assert_twice_as_good,
    by_reference,
    layouts,
    make_features,
    make_rois,
    run,
)

sizes = pytest.mark.parametrize("output_size", [(7, 7), (14, 14), (3, 5), (20, 2)], ids=str)


@pytest.fixture
def poisoned():
    """Fresh memory holds NaN, so that what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# ---------------------------------------------------------------------------------------------
# Against the reference and torchvision


@layouts
@pytest.mark.parametrize(
    ("channels", "output_size"),
    [(1, (7, 7)), (3, (3, 5)), (17, (14, 14)), (17, (20, 2)), (63, (7, 7)), (63, (3, 5)), (256, (7, 7))],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_output_and_gradient_are_as_exact_as_plain_pytorch(dtype, channels, output_size, layout):
    features = make_features(2, channels, 21, 38, dtype=dtype, layout=layout)
    rois = make_rois(7, 2, 42, 76)
    grad = make_features(7, channels, *output_size, dtype=dtype, seed=1)
    for sampling_ratio, aligned in ((2, False), (0, True)):
        options = output_size, 0.5, sampling_ratio, aligned
        exact = run(by_reference, features.double(), rois.double(), grad, *options)
        plain = run(by_reference, features, rois, grad, *options)
        for actual, plainly, exactly in zip(run(roi_align, features, rois, grad, *options), plain, exact, strict=True):
            assert actual.dtype == dtype
            assert_twice_as_good(actual, plainly, exactly)


@layouts
@sizes
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling_ratio", [-1, 1, 2, 3])
def test_equals_torchvision(sampling_ratio, aligned, output_size, layout):
    features = make_features(2, 19, 27, 35, dtype=torch.float64, layout=layout)
    rois = make_rois(12, 2, 54, 70).double()
    grad = make_features(12, 19, *output_size, dtype=torch.float64, seed=1)
    options = output_size, 0.5, sampling_ratio, aligned
    exact = run(torchvision.ops.roi_align, features, rois, grad, *options)
    for ours, theirs in zip(run(roi_align, features, rois, grad, *options), exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    single = features.float(), rois.float(), grad.float()
    expected = run(torchvision.ops.roi_align, *single, *options)
    for ours, theirs, exactly in zip(run(roi_align, *single, *options), expected, exact, strict=True):
        assert_twice_as_good(ours, theirs, exactly)


@settings(max_examples=60, deadline=None)
@given(
    boxes=st.lists(
        st.tuples(*[st.floats(-80, 80, width=32) | st.sampled_from([0.0, 0.5, -1e9, 3e4, 1e38])] * 4),
        min_size=1,
        max_size=6,
    ),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    channels=st.sampled_from([1, 2, 16, 18]),
    output_size=st.tuples(st.integers(1, 9), st.integers(1, 18)),
    sampling_ratio=st.integers(-1, 4),
    aligned=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_box_on_any_map(boxes, height, width, channels, output_size, sampling_ratio, aligned, layout):
    features = make_features(1, channels, height, width, dtype=torch.float64, layout=layout)
    rois = torch.nn.functional.pad(torch.tensor(boxes, dtype=torch.float64), (1, 0))
    grad = make_features(len(boxes), channels, *output_size, dtype=torch.float64, seed=1)
    options = output_size, 0.7, sampling_ratio, aligned
    actual = run(roi_align, features, rois, grad, *options)
    expected = run(by_reference, features, rois, grad, *options)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_reference_gradient():
    features = make_features(1, 2, 3, 5, dtype=torch.float64).requires_grad_()
    rois = make_rois(3, 1, 3, 5).double()
    for options in (((2, 3), 1.0, 2, False), ((3, 2), 0.9, 0, True)):
        assert torch.autograd.gradcheck(lambda x, options=options: by_reference(x, rois, *options), (features,))
        assert torch.autograd.gradcheck(lambda x, options=options: roi_align(x, rois, *options), (features,))


class Divisors(TorchDispatchMode):
    """Notes by what is divided."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if "div" in function.__name__ or "reciprocal" in function.__name__:
            self.seen.append(arguments[1])
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("level_rule", LEVEL_RULES.values(), ids=LEVEL_RULES)
def test_the_reference_divides_alike_on_every_device(level_rule):
    """By a Python number, or a tensor of one element on the CPU, CUDA multiplies with the reciprocal instead: the last
    bit is another, and with it at times a level, or whether a sample at the edge of the map counts."""
    features = [make_features(1, 2, 8, 8), make_features(1, 2, 4, 4)]
    rois = make_rois(5, 1, 16, 16)
    with Divisors() as divisors:
        for sampling_ratio in (2, 0):
            pooling = [0.5, 0.25], [1.0, 1.3], (3, 5), sampling_ratio, False, 7.0, 2, *level_rule
            reference.multiscale_roi_align(features, rois, Pooling(*pooling))
    assert len(divisors.seen) >= 10
    assert all(isinstance(divisor, torch.Tensor) for divisor in divisors.seen)


@layouts
def test_transpose_in_the_reference_is_the_gradient(layout):
    features = make_features(2, 3, 9, 11, dtype=torch.float64, layout=layout)
    rois, grad = make_rois(5, 2, 9, 11).double(), make_features(5, 3, 4, 4, dtype=torch.float64, seed=1)
    for sampling_ratio in (2, 0):
        _, expected = run(by_reference, features, rois, grad, (4, 4), 1.0, sampling_ratio, True)
        pooling = [1.0], [1.0], (4, 4), sampling_ratio, True, 224.0, 4, *TORCHVISION
        last = layout == CHANNELS_LAST
        (actual,) = reference.multiscale_roi_align_backward([grad], rois, [2, 3, 9, 11], last, Pooling(*pooling))
        torch.testing.assert_close(actual, expected)
        assert actual.is_contiguous(memory_format=layout)


# ---------------------------------------------------------------------------------------------
# Memory: layout, poison, strides, determinism


@layouts
def test_layout_of_results_is_that_of_the_input(layout):
    features = make_features(2, 8, 9, 10, layout=layout)
    output, grad = run(roi_align, features, make_rois(3, 2, 9, 10), torch.ones(3, 8, 5, 5), 5)
    for result in (output, grad):
        assert result.is_contiguous(memory_format=layout)
        assert result.is_contiguous(memory_format=CHANNELS_LAST) == (layout == CHANNELS_LAST)


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [3, 40])
def test_every_element_is_written(poisoned, channels, dtype, layout):
    assert torch.empty(4).isnan().all(), "the poison does not work"
    features = make_features(2, channels, 30, 90, dtype=dtype, layout=layout)
    rois = torch.cat([make_rois(6, 2, 30, 90), torch.tensor([[0.0, -90, -90, -50, -50], [1, torch.nan, 0, 5, 5]])])
    for count in (8, 7, 0):  # with none, the gradient is zero
        grad = torch.ones(count, channels, 7, 7)
        for result in run(roi_align, features, rois[8 - count :], grad, 7):
            assert result.isfinite().all()


@pytest.mark.parametrize("layout", ["sliced", "sliced nhwc", "transposed", "expanded", "flipped grad"])
def test_any_strides(layout):
    rois = make_rois(5, 2, 12, 13)
    grad = make_features(5, 6, 4, 4, seed=1)
    if layout == "sliced":
        features = make_features(2, 9, 20, 20)[:, 1:7, 4:16, 5:18]
    elif layout == "sliced nhwc":
        features = make_features(2, 9, 20, 20, layout=CHANNELS_LAST)[:, 1:7, 4:16, 5:18]
    elif layout == "transposed":
        features = make_features(2, 6, 13, 12).transpose(2, 3)
    elif layout == "expanded":
        features = make_features(1, 1, 12, 13).expand(2, 6, 12, 13)
    else:
        features, grad = make_features(2, 6, 12, 13), make_features(5, 4, 4, 6, seed=1).permute(0, 3, 2, 1)
    options = (4, 4), 1.0, 2, False
    expected = run(by_reference, features.contiguous(), rois, grad.contiguous(), *options)
    for ours, theirs in zip(run(roi_align, features, rois, grad, *options), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_result_does_not_depend_on_the_number_of_threads(dtype, layout):
    features = make_features(2, 70, 40, 60, dtype=dtype, layout=layout)
    rois = make_rois(100, 2, 40, 60)
    grad = make_features(100, 70, 7, 7, dtype=dtype, seed=1)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(run(roi_align, features, rois, grad, 7, 1.0, 2))
    finally:
        torch.set_num_threads(before)
    for output, gradient in results[1:]:
        assert torch.equal(output, results[0][0])
        assert torch.equal(gradient, results[0][1])


@layouts
def test_more_than_2_to_the_31_elements_are_read_right(layout):
    """The map is never written but for its last corner, so that only some pages of it exist."""
    corner = torch.randn(4, 9, 10, dtype=torch.float32).half()
    features = torch.empty(3, 4, 16400, 16400, dtype=torch.float16, memory_format=layout)  # 3.2 * 10^9 elements
    features[-1, :, -9:, -10:] = corner
    rois = torch.tensor([[2.0, 16391.5, 16392.0, 16399.5, 16396.0]])
    inside = rois - torch.tensor([2.0, 16390, 16391, 16390, 16391])
    assert torch.equal(roi_align(features, rois, 4, 1.0, 2), roi_align(corner[None], inside, 4, 1.0, 2))


def _free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(_free_memory() < 8 * 2**30, reason="needs 8 GiB of free memory: the gradient alone takes 4")
def test_more_than_2_to_the_31_elements_are_written_right():
    backward, pooling = (
        torch.ops.doublehead.pyramid_roi_align_backward,
        ([1.0], [1.0], (4, 4), 2, False, 224.0, 4, *TORCHVISION),
    )
    grad = make_features(1, 4, 4, 4, dtype=torch.bfloat16)
    rois = torch.tensor([[0.0, 23180.5, 23181.0, 23188.5, 23185.0]])
    inside = rois - torch.tensor([0.0, 23170, 23170, 23170, 23170])
    (actual,) = backward([grad], rois, [1, 4, 23190, 23190], True, *pooling)  # 2.15 * 10^9 elements
    (expected,) = backward([grad], inside, [1, 4, 20, 20], True, *pooling)
    assert torch.equal(actual[..., -20:, -20:], expected)
    assert expected.any()
    assert not actual[..., -40:-20, :].any()
    assert not actual[..., :20, :].any()


# ---------------------------------------------------------------------------------------------
# Cases that peers get wrong


@layouts
@pytest.mark.parametrize("sampling_ratio", [2, 0])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_box_that_is_not_finite_pools_zeros_and_harms_no_other(bad, aligned, sampling_ratio, layout):
    features = make_features(2, 5, 16, 17, layout=layout)
    good = make_rois(4, 2, 16, 17)
    wrong = good[:1].repeat(4, 1)
    wrong[range(4), range(1, 5)] = bad
    rois = torch.cat([wrong, good])
    grad = make_features(8, 5, 7, 7, seed=1)
    output, gradient = run(roi_align, features, rois, grad, 7, 1.0, sampling_ratio, aligned)
    expected, expected_gradient = run(roi_align, features, good, grad[4:], 7, 1.0, sampling_ratio, aligned)
    assert not output[:4].any()
    assert torch.equal(output[4:], expected)
    torch.testing.assert_close(gradient, expected_gradient)


@layouts
@pytest.mark.parametrize(
    "box",
    [(9, 9, 3, 3), (9, 3, 12, 2), (5, 5, 5, 5), (5, 5, 9, 5), (-60, -60, -50, -50), (40, 3, 60, 9)],
    ids=["negative sides", "negative height", "no area", "no height", "far left", "far right"],
)
def test_aligned_adaptive_box_without_samples_pools_zeros(box, layout):
    features = make_features(1, 20, 16, 17, layout=layout)
    rois = torch.tensor([[0.0, *box]])
    output, gradient = run(roi_align, features, rois, torch.ones(1, 20, 7, 7), 7, 1.0, -1, True)
    assert not output.any()
    assert not gradient.any()


@layouts
@pytest.mark.parametrize(("sampling_ratio", "aligned"), [(2, True), (2, False), (-1, False)])
def test_inverted_box_is_as_in_torchvision(sampling_ratio, aligned, layout):
    features = make_features(1, 20, 16, 17, layout=layout)
    rois = torch.tensor([[0.0, 12, 11, 3, 2], [0, 12, 2, 3, 11], [0, 3, 11, 12, 2]])
    grad = make_features(3, 20, 7, 7, seed=1)
    options = 7, 1.0, sampling_ratio, aligned
    expected = run(torchvision.ops.roi_align, features, rois, grad, *options)
    for ours, theirs in zip(run(roi_align, features, rois, grad, *options), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@layouts
@pytest.mark.parametrize("image", [-1.0, 2.0, 1e9, torch.nan, torch.inf])
def test_batch_index_out_of_range_is_an_error(image, layout):
    features = make_features(2, 4, 8, 8, layout=layout).requires_grad_()
    rois = torch.tensor([[0.0, 0, 0, 4, 4], [image, 0, 0, 4, 4]])
    with pytest.raises(RuntimeError, match=r"rois\[1, 0\] is .*batch index must be in \[0, 2\)"):
        roi_align(features, rois, 7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_boxes_keep_float32_whatever_the_features(dtype):
    ramp = torch.arange(400.0, dtype=dtype).expand(1, 1, 4, 400)  # so that the output is the coordinate
    rois = torch.tensor([[0.0, 200.53125, 0, 202.53125, 2]])
    output = roi_align(ramp, rois, 1, 1.0, 2)
    assert output.item() == torch.tensor(201.53125).to(dtype).item()


@layouts
def test_16_bit_boxes_are_widened(layout):
    features = make_features(1, 4, 30, 30, dtype=torch.bfloat16, layout=layout)
    rois = make_rois(3, 1, 30, 30).bfloat16()
    assert torch.equal(roi_align(features, rois, 7), roi_align(features, rois.float(), 7))


@layouts
def test_infinite_pixel_stays_within_its_bins(layout):
    features = make_features(1, 18, 40, 40, layout=layout)
    features[0, 3, 20, 20] = torch.inf
    rois = torch.tensor([[0.0, 10, 10, 31, 31]])
    output = roi_align(features, rois, 7, 1.0, 2)
    expected = torchvision.ops.roi_align(features, rois, 7, 1.0, 2)
    torch.testing.assert_close(output, expected, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert not output[0, :3].isnan().any()


@layouts
def test_infinite_gradient_stays_within_its_pixels(layout):
    features, rois = make_features(1, 18, 40, 40, layout=layout), torch.tensor([[0.0, 10, 10, 31, 31]])
    grad = make_features(1, 18, 7, 7, seed=1)
    grad[0, 3, 2, 2] = torch.inf
    _, ours = run(roi_align, features, rois, grad, 7, 1.0, 2)
    _, theirs = run(torchvision.ops.roi_align, features, rois, grad, 7, 1.0, 2)
    assert torch.equal(ours.isfinite(), theirs.isfinite())


@layouts
def test_nothing_to_pool(layout):
    features = make_features(2, 6, 9, 9, layout=layout).requires_grad_()
    for boxes in (torch.zeros(0, 5), [], [torch.zeros(0, 4)] * 2):
        output = roi_align(features, boxes, (3, 5))
        assert output.shape == (0, 6, 3, 5)
        (gradient,) = torch.autograd.grad(output.sum(), features)
        assert gradient.shape == features.shape
        assert not gradient.any()
    assert roi_align(features[:0], torch.zeros(0, 5), 7).shape == (0, 6, 7, 7)
    assert roi_align(features[:, :0], make_rois(2, 2, 9, 9), 7).shape == (2, 0, 7, 7)
    assert not roi_align(torch.ones(1, 6, 0, 9), make_rois(2, 1, 9, 9), 7).any()


def test_boxes_as_a_list():
    features = make_features(3, 6, 20, 20)
    rois = make_rois(7, 3, 20, 20)
    rois = rois[rois[:, 0].argsort(stable=True)]
    boxes = [rois[rois[:, 0] == i, 1:] for i in range(3)]
    assert torch.equal(roi_align(features, boxes, 7), roi_align(features, rois, 7))
    assert torch.equal(roi_align(features, boxes[:1], 7), roi_align(features, rois[rois[:, 0] == 0], 7))
