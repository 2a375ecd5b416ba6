"""RoIAlign on a GPU: against the reference in float64, and all that only a GPU can show."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from doublehead.ops import multiscale_roi_align, roi_align
from doublehead.ops._library import native
from doublehead.ops.roi_align import reference
from doublehead.ops.roi_align.pooling import Pooling
from tests.support.roi_align_calls import BACKWARD, FORWARD, POOLING, make_pyramid, pyramid_rois
from tests.support.roi_align_cases import (
    LAYOUTS,
    TORCHVISION,
    assert_twice_as_good,
    by_reference,
    layouts,
    make_features,
    make_rois,
    run,
)

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)


def fpn(images=2, channels=256, dtype=torch.float32, layout=torch.channels_last, device="cuda") -> list[Tensor]:
    torch.manual_seed(0)
    sizes = [(100, 168), (50, 84), (25, 42), (13, 21)]
    return [
        torch.randn(images, channels, *size, device=device).to(dtype).contiguous(memory_format=layout) for size in sizes
    ]


def clustered_rois(count=1000, images=2, objects=8, device="cuda") -> Tensor:
    """Boxes of 16 to 400 pixels, jittered about few objects, as a region proposal network gives them."""
    generator = torch.Generator().manual_seed(1)
    centre = torch.rand(objects, 2, generator=generator) * torch.tensor([672.0, 400.0])
    size = 16 * 25 ** torch.rand(objects, 2, generator=generator)
    of = torch.randint(objects, (count,), generator=generator)
    jitter = torch.randn(count, 4, generator=generator) * 0.1
    centre, size = centre[of] + jitter[:, :2] * size[of], size[of] * jitter[:, 2:].exp()
    image = torch.randint(images, (count, 1), generator=generator)
    return torch.cat([image, centre - size / 2, centre + size / 2], 1).to(device)


def pool(features, rois, **options):
    return multiscale_roi_align(features, rois, 7, spatial_scales=SCALES, box_scales=(1.0, 1.3), **options)


def pool_and_differentiate(features, rois) -> list[Tensor]:
    leaves = [feature.detach().requires_grad_() for feature in features]
    outputs = pool(leaves, rois)
    generator = torch.Generator().manual_seed(2)  # of the CPU: a GPU's draws other numbers from the same seed
    weights = [torch.randn(o.shape, generator=generator).to(o.device) for o in outputs]
    loss = sum((output.float() * weight).sum() for output, weight in zip(outputs, weights, strict=True))
    return [output.detach() for output in outputs] + list(torch.autograd.grad(loss, leaves))


def test_the_compiled_kernels_serve_cuda():
    assert native("pyramid_roi_align", "cuda")
    assert native("pyramid_roi_align_backward", "cuda")


# ---------------------------------------------------------------------------------------------
# Values


@layouts
@dtypes
@pytest.mark.parametrize(
    ("channels", "output_size"),
    [(1, (7, 7)), (3, (3, 5)), (17, (14, 14)), (63, (20, 2)), (256, (7, 7)), (264, (14, 14)), (8, (35, 70))],
    ids=str,
)
def test_output_and_gradient_are_as_exact_as_plain_pytorch(dtype, channels, output_size, layout):
    features = make_features(2, channels, 21, 38, dtype=dtype, layout=layout).cuda()
    rois = make_rois(7, 2, 42, 76).cuda().to(torch.float64 if dtype == torch.float64 else torch.float32)
    grad = make_features(7, channels, *output_size, dtype=dtype, seed=1).cuda()
    for sampling_ratio, aligned in ((2, False), (0, True)):
        options = output_size, 0.5, sampling_ratio, aligned
        exact = run(by_reference, features.double(), rois.double(), grad, *options)
        plain = run(by_reference, features, rois, grad, *options)
        for actual, plainly, exactly in zip(run(roi_align, features, rois, grad, *options), plain, exact, strict=True):
            assert actual.dtype == dtype
            assert actual.is_contiguous(memory_format=layout)
            if dtype == torch.float64:
                torch.testing.assert_close(actual, exactly, rtol=1e-12, atol=1e-12)
            else:
                assert_twice_as_good(actual, plainly, exactly)


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_the_cpu_kernel_on_a_pyramid(dtype, layout):
    features = fpn(channels=24, dtype=dtype, layout=layout)
    rois = clustered_rois(300).to(dtype)
    rois[7, 1], rois[8, 3] = torch.nan, torch.inf
    expected = pool_and_differentiate([f.cpu() for f in features], rois.cpu())
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    for actual, on_cpu in zip(pool_and_differentiate(features, rois), expected, strict=True):
        torch.testing.assert_close(actual.cpu(), on_cpu, rtol=tolerance, atol=tolerance)


@layouts
def test_gradient_of_2000_boxes_on_one_object(layout):
    features, rois = fpn(1, 256, layout=layout), clustered_rois(2000, 1, objects=1)
    rounded = [f.double() for f in features]
    for actual, exact in zip(
        pool_and_differentiate(features, rois), pool_and_differentiate(rounded, rois.double()), strict=True
    ):
        assert (actual.double() - exact).abs().max() <= 1e-4 * exact.abs().max().clamp(min=1)


@layouts
@pytest.mark.parametrize("image", [-1.0, 2.0, 1e9, torch.nan, torch.inf])
def test_batch_index_out_of_range_pools_zeros(image, layout):
    features = make_features(2, 8, 16, 16, layout=layout).cuda()
    rois = torch.tensor([[0.0, 1, 1, 9, 9], [image, 0, 0, 8, 8], [1, 2, 2, 12, 9]], device="cuda")
    grad = torch.ones(3, 8, 7, 7, device="cuda")
    output, gradient = run(roi_align, features, rois, grad, 7)
    assert not output[1].any()
    expected, expected_gradient = run(roi_align, features, rois[[0, 2]], grad[:2], 7)
    assert torch.equal(output[[0, 2]], expected)
    assert torch.equal(gradient, expected_gradient)


@layouts
@pytest.mark.parametrize("sampling_ratio", [2, 0])
@pytest.mark.parametrize("aligned", [False, True])
def test_strange_boxes(aligned, sampling_ratio, layout):
    inf, nan = torch.inf, torch.nan
    boxes = torch.tensor([
        [nan, 1, 5, 5], [1, inf, 5, 5], [1, 1, -inf, 5], [1, 1, 5, inf], [9, 9, 3, 3], [9, 3, 12, 2], [5, 5, 5, 5],
        [5, 5, 9, 5], [-60, -60, -50, -50], [40, 3, 60, 9], [-1e9, 0, 10, 10], [3, 3, 1e9, 9], [-3e4, 2, 3e4, 9],
    ])  # fmt: skip
    rois = torch.nn.functional.pad(boxes, (1, 0)).double().cuda()
    features = make_features(1, 20, 16, 17, dtype=torch.float64, layout=layout).cuda()
    grad = make_features(len(boxes), 20, 7, 3, dtype=torch.float64, seed=1).cuda()
    options = (7, 3), 1.0, sampling_ratio, aligned
    # Box by box, since a mean over 10^9 samples is far below the values beside it; and against the definition on the
    # CPU and on the device, which must not differ by more than the order of their sums either.
    for k in range(len(boxes)):
        case = features, rois[k : k + 1], grad[k : k + 1]
        on_device = run(by_reference, *case, *options)
        on_cpu = run(by_reference, *(tensor.cpu() for tensor in case), *options)
        for actual, there, here in zip(run(roi_align, *case, *options), on_device, on_cpu, strict=True):
            allowed = 1e-13 * here.abs().max()
            assert (actual.cpu() - here).abs().max() <= allowed, boxes[k]
            assert (there.cpu() - here).abs().max() <= allowed, boxes[k]


@layouts
def test_every_element_is_written(layout):
    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN
    try:
        features, rois = fpn(2, 40, layout=layout), clustered_rois(50)
        for count in (50, 0):
            for result in pool_and_differentiate(features, rois[:count]):
                assert result.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("layout", ["sliced", "sliced nhwc", "transposed", "expanded"])
def test_any_strides(layout):
    base = make_features(2, 9, 20, 20).cuda()
    if layout == "sliced":
        features = base[:, 1:7, 4:16, 5:18]
    elif layout == "sliced nhwc":
        features = base.contiguous(memory_format=torch.channels_last)[:, 1:7, 4:16, 5:18]
    elif layout == "transposed":
        features = base[:, 1:7, 4:17, 5:17].transpose(2, 3)
    else:
        features = base[:1, :1, 4:16, 5:18].expand(2, 6, 12, 13)
    rois, grad = make_rois(5, 2, 12, 13).cuda(), make_features(5, 6, 4, 4, seed=1).cuda()
    options = (4, 4), 1.0, 2, False
    expected = run(by_reference, features.contiguous(), rois, grad, *options)
    for ours, theirs in zip(run(roi_align, features, rois, grad, *options), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@layouts
@pytest.mark.parametrize(("channels", "dtype"), [(4, torch.float16), (8, torch.float16), (8, torch.bfloat16)], ids=str)
def test_more_than_2_to_the_31_elements(channels, dtype, layout):
    """8 channels side by side are read 16 bytes at a time, 4 one by one: other kernels, each with its own indices."""
    side = 16400 if channels == 4 else 11600
    assert 3 * channels * side**2 > 2**31
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    corner = torch.randn(channels, 9, 10, device="cuda").to(dtype)
    features = torch.empty(3, channels, side, side, dtype=dtype, device="cuda", memory_format=layout)
    features[-1, :, -9:, -10:] = corner
    offset = torch.tensor([2.0, side - 10, side - 9, side - 10, side - 9], device="cuda")
    inside = torch.tensor([[0.0, 1.5, 1.0, 9.5, 5.0]], device="cuda")
    rois = inside + offset
    assert torch.equal(rois - offset, inside)  # float32 holds these corners exactly
    corner = corner[None].contiguous(memory_format=layout)
    assert torch.equal(roi_align(features, rois, 4, 1.0, 2), roi_align(corner, inside, 4, 1.0, 2))
    del features
    grad, pooling = (
        torch.randn(1, channels, 4, 4, device="cuda").to(dtype),
        ([1.0], [1.0], (4, 4), 2, False, 224.0, 4, *TORCHVISION),
    )
    last = layout == LAYOUTS[1]
    (actual,) = BACKWARD([grad], rois, [3, channels, side, side], last, *pooling)
    (expected,) = BACKWARD([grad], inside, [1, channels, 9, 10], last, *pooling)
    assert torch.equal(actual[-1:, :, -9:, -10:], expected)
    assert expected.any()
    assert not actual[:2].any()


# ---------------------------------------------------------------------------------------------
# Determinism, streams, graphs


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_thousand_runs_are_equal_to_the_last_bit(dtype, layout):
    features, rois = fpn(2, 64, dtype=dtype, layout=layout), clustered_rois(500)
    first = pool_and_differentiate(features, rois)
    for _ in range(1000):
        for result, expected in zip(pool_and_differentiate(features, rois), first, strict=True):
            assert torch.equal(result, expected)


@layouts
def test_nothing_waits_for_the_device(layout):
    features, rois = fpn(layout=layout), clustered_rois()
    pool_and_differentiate(features, rois)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for sampling_ratio in (2, 0):
            leaves = [feature.detach().requires_grad_() for feature in features]
            outputs = pool(leaves, rois, sampling_ratio=sampling_ratio)
            torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@layouts
def test_captured_graph_follows_its_inputs(layout):
    features, rois = fpn(2, 32, layout=layout), clustered_rois(200)
    sizes = [*features[0].shape[:2], *(side for f in features for side in f.shape[2:])]
    pooling = list(SCALES), [1.0, 1.3], [7, 7], 2, False, 224.0, 4, *TORCHVISION

    def both():
        outputs = FORWARD(features, rois, *pooling)
        return outputs + BACKWARD(outputs, rois, sizes, layout == LAYOUTS[1], *pooling)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        both()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    for seed in (3, 4):
        generator = torch.Generator("cuda").manual_seed(seed)
        for feature in features:
            feature.normal_(generator=generator)
        rois[:, 1:] += torch.randn(200, 4, device="cuda", generator=generator).abs() * torch.tensor(
            [-9.0, -9.0, 60.0, 60.0], device="cuda"
        )
        graph.replay()
        for result, expected in zip(captured, both(), strict=True):
            assert torch.equal(result, expected)


def test_another_stream():
    features, rois = fpn(), clustered_rois()
    expected = pool_and_differentiate(features, rois)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**7)
        later = [feature * 1 for feature in features]  # ready only once the stream has slept
        results = pool_and_differentiate(later, rois)
    torch.cuda.current_stream().wait_stream(stream)
    for result, ours in zip(results, expected, strict=True):
        assert torch.equal(result, ours)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device():
    features, rois = fpn(device="cuda:1"), clustered_rois(device="cuda:1")
    expected = pool_and_differentiate(fpn(), clustered_rois())
    for result, ours in zip(pool_and_differentiate(features, rois), expected, strict=True):
        assert result.device == torch.device("cuda:1")
        torch.testing.assert_close(result.cpu(), ours.cpu(), rtol=1e-4, atol=1e-4)
    assert torch.cuda.current_device() == 0


# ---------------------------------------------------------------------------------------------
# As an operator


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, layout):
    features = [f.cuda().detach().requires_grad_() for f in make_pyramid(layout, dtype)]
    rois = pyramid_rois().cuda()
    assert set(torch.library.opcheck(FORWARD, (features, rois, *POOLING)).values()) == {"SUCCESS"}
    grads = [torch.randn(4, 18, 3, 5, device="cuda").to(dtype) for _ in range(2)]
    arguments = grads, rois, [2, 18, 24, 20, 12, 10], layout == LAYOUTS[1], *POOLING
    assert set(torch.library.opcheck(BACKWARD, arguments).values()) == {"SUCCESS"}


@layouts
def test_gradcheck(layout):
    features = make_features(1, 2, 3, 5, dtype=torch.float64, layout=layout).cuda().requires_grad_()
    rois = make_rois(3, 1, 3, 5).double().cuda()
    for options in (((2, 3), 1.0, 2, False), ((3, 2), 0.9, 0, True)):
        assert torch.autograd.gradcheck(lambda x, options=options: roi_align(x, rois, *options), (features,))


@layouts
def test_compiles_whole(layout):
    torch._dynamo.reset()
    compiled = torch.compile(pool, fullgraph=True, dynamic=True)
    features = fpn(2, 16, layout=layout)
    for count in (100, 37):
        rois = clustered_rois(count)
        for actual, expected in zip(compiled(features, rois), pool(features, rois), strict=True):
            torch.testing.assert_close(actual, expected)
            assert actual.is_contiguous(memory_format=layout)


def test_autocast_changes_neither_features_nor_boxes():
    features, rois = fpn(1, 16), clustered_rois(50, 1)
    with torch.autocast("cuda", torch.bfloat16):
        outputs = pool(features, rois)
        mixed = pool([features[0].bfloat16(), *features[1:]], rois)
    for actual, expected in zip(outputs, pool(features, rois), strict=True):
        assert torch.equal(actual, expected)
    for actual, expected in zip(mixed, pool([features[0].bfloat16().float(), *features[1:]], rois), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: torch.zeros(2, 4)}, "rois must have size 5"),
        ({1: torch.zeros(2, 5).double()}, "rois must be Float"),
        ({2: [0.5]}, "spatial_scales must have one scale"),
        ({3: []}, "box_scales must hold"),
        ({3: [1.0] * 9}, "up to 8 box_scales"),
        ({4: [0, 7]}, "output_size must be positive"),
        ({0: [torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 4, 4)]}, "features must have size 3"),
    ],
)
def test_the_bare_operator_reads_nothing_out_of_place(change, message):
    arguments = [[torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 4, 4)], torch.zeros(2, 5), *POOLING]
    for place, value in change.items():
        arguments[place] = value
    arguments[0] = [feature.cuda() for feature in arguments[0]]
    arguments[1] = arguments[1].cuda()
    with pytest.raises(RuntimeError, match=message):
        FORWARD(*arguments)


def test_mixed_devices_are_an_error():
    features, rois = [f.cuda() for f in make_pyramid()], pyramid_rois()
    with pytest.raises(ValueError, match="rois must be on the device of the features, cuda:0, got cpu"):
        pool(features, rois)
    with pytest.raises(RuntimeError, match="rois must be on a CUDA device"):
        FORWARD(features, rois, *POOLING)
    with pytest.raises(RuntimeError, match="features must be on a CUDA device"):
        FORWARD([features[0], features[1].cpu()], rois.cuda(), *POOLING)


def test_result_is_the_references():
    """The operator's definition itself runs on the device as well."""
    features, rois = [f.cuda() for f in make_pyramid()], pyramid_rois().cuda()
    expected = reference.multiscale_roi_align(features, rois, Pooling(*POOLING))
    for actual, plain in zip(FORWARD(features, rois, *POOLING), expected, strict=True):
        torch.testing.assert_close(actual, plain, rtol=1e-5, atol=1e-5)
