"""RoIAlign as a torch operator: opcheck, torch.compile, torch.export, autocast, autograd, and its errors."""

import pytest
import torch

from doublehead.ops import multiscale_roi_align, roi_align
from doublehead.ops.roi_align import reference
from doublehead.ops.roi_align.pooling import Pooling
from tests.support.roi_align_calls import (
    BACKWARD,
    FORWARD,
    POOLING,
    make_pyramid,
    pool_and_differentiate,
    pyramid_rois,
)

LAYOUTS = [torch.contiguous_format, torch.channels_last]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])


def pool(features, rois):
    return multiscale_roi_align(
        features, rois, (3, 5), spatial_scales=(0.5, 0.25), box_scales=(1.0, 1.3), canonical_size=56, canonical_level=3
    )


# ---------------------------------------------------------------------------------------------
# opcheck, compile, export


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_forward(dtype, layout):
    results = torch.library.opcheck(FORWARD, (make_pyramid(layout, dtype, True), pyramid_rois(), *POOLING))
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) == 4


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck_backward(dtype, layout):
    grads = [torch.randn(4, 18, 3, 5).to(dtype) for _ in range(2)]
    sizes = [2, 18, 24, 20, 12, 10]
    results = torch.library.opcheck(BACKWARD, (grads, pyramid_rois(), sizes, layout == LAYOUTS[1], *POOLING))
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) == 4


@layouts
@pytest.mark.parametrize("count", [0, 4])
def test_fake_results_have_the_layout_of_real_ones(count, layout):
    features, rois = make_pyramid(layout), pyramid_rois()[:count]
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = FORWARD([mode.from_tensor(f) for f in features], mode.from_tensor(rois), *POOLING)
    for fake, real in zip(fakes, FORWARD(features, rois, *POOLING), strict=True):
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


@layouts
def test_compiles_whole_with_dynamic_shapes(layout):
    torch._dynamo.reset()
    compiled = torch.compile(pool, fullgraph=True, dynamic=True, backend="aot_eager")
    features = make_pyramid(layout)
    for rois in (pyramid_rois(), pyramid_rois()[:3], torch.rand(2, 7, 4) * 40):
        results = pool_and_differentiate(compiled, features, rois)
        for actual, expected in zip(results, pool_and_differentiate(pool, features, rois), strict=True):
            torch.testing.assert_close(actual, expected)
            assert actual.is_contiguous(memory_format=layout)


def test_one_level_compiles_whole():
    torch._dynamo.reset()
    compiled = torch.compile(roi_align, fullgraph=True, dynamic=True, backend="aot_eager")
    (feature, _), rois = make_pyramid(), pyramid_rois()
    boxes = [rois[:1, 1:], rois[1:3, 1:]]
    for arguments in ((rois, 7, 0.5, 2, True), (boxes, (3, 5), 0.5, 0)):
        torch.testing.assert_close(compiled(feature, *arguments), roi_align(feature, *arguments))


def test_exports_with_a_dynamic_number_of_boxes():
    class Pool(torch.nn.Module):
        def forward(self, fine, coarse, rois):
            return pool([fine, coarse], rois)

    features, rois = make_pyramid(), pyramid_rois()
    count = torch.export.Dim("count", min=1)
    program = torch.export.export(Pool(), (*features, rois), dynamic_shapes=(None, None, {0: count}))
    assert "doublehead.pyramid_roi_align" in str(program.graph)
    for number in (4, 2):
        outputs = program.module()(*features, rois[:number])
        for actual, expected in zip(outputs, pool(features, rois[:number]), strict=True):
            assert torch.equal(actual, expected)


def test_the_operator_itself_is_differentiable_as_the_function_is():
    features, rois = make_pyramid(), pyramid_rois()
    actual = pool_and_differentiate(lambda features, rois: FORWARD(features, rois, *POOLING), features, rois)
    for ours, expected in zip(actual, pool_and_differentiate(pool, features, rois), strict=True):
        assert torch.equal(ours, expected)


@layouts
def test_reference_serves_devices_without_a_kernel(layout):
    """Called below the dispatcher's choice of kernel, as on such a device."""
    features, rois = make_pyramid(layout), pyramid_rois()
    outputs = reference.multiscale_roi_align(features, rois, Pooling(*POOLING))
    for actual, expected in zip(outputs, pool(features, rois), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        assert actual.stride() == expected.stride()


def test_reference_pools_zeros_from_an_image_that_is_not_there():
    features, rois = make_pyramid(), pyramid_rois()
    rois[1, 0], rois[2, 0] = 7, -3
    outputs = reference.multiscale_roi_align(features, rois, Pooling(*POOLING))
    for output, expected in zip(outputs, pool(features, pyramid_rois()), strict=True):
        assert not output[1:3].any()
        torch.testing.assert_close(output[[0, 3]], expected[[0, 3]], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------
# Autocast


@pytest.mark.parametrize("call", [pool, torch.compile(pool, fullgraph=True, backend="aot_eager")])
def test_autocast_changes_neither_features_nor_boxes(call):
    features = make_pyramid(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = call(features, pyramid_rois())
    for actual, expected in zip(outputs, pool(features, pyramid_rois()), strict=True):
        assert torch.equal(actual, expected)


def test_autocast_brings_levels_of_several_dtypes_to_the_widest():
    fine, coarse = make_pyramid()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = pool([fine.bfloat16(), coarse], pyramid_rois())
        grads = pool_and_differentiate(pool, [fine.bfloat16(), coarse], pyramid_rois())[2:]
    for actual, expected in zip(outputs, pool([fine.bfloat16().float(), coarse], pyramid_rois()), strict=True):
        assert torch.equal(actual, expected)
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32]


# ---------------------------------------------------------------------------------------------
# Autograd


def test_gradient_of_boxes_is_a_clear_error():
    features, rois = make_pyramid(requires_grad=True), pyramid_rois().requires_grad_()
    for outputs in (pool(features, rois), FORWARD(features, rois, *POOLING)):  # nothing wrong with pooling alone
        with pytest.raises(RuntimeError, match=r"gradient of the boxes is not defined; pass boxes.detach\(\)"):
            outputs[0].sum().backward()


def test_second_derivative_is_an_error():
    features = make_pyramid(requires_grad=True)
    grads = torch.autograd.grad(pool(features, pyramid_rois())[0].square().sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grads[0].sum().backward()


def test_function_transforms():
    (feature, _), rois = make_pyramid(), pyramid_rois()
    gradient = torch.func.grad(lambda x: roi_align(x, rois, 3, 0.5, 2).square().sum())(feature)
    leaf = feature.clone().requires_grad_()
    roi_align(leaf, rois, 3, 0.5, 2).square().sum().backward()
    assert torch.equal(gradient, leaf.grad)


def test_inference_mode_and_frozen_features():
    features, rois = make_pyramid(), pyramid_rois()
    with torch.inference_mode():
        outputs = pool(features, rois)
    assert not pool(features, rois)[0].requires_grad
    assert torch.equal(outputs[0], pool(features, rois)[0])
    features[1].requires_grad_()
    pool(features, rois)[0].sum().backward()
    assert features[0].grad is None
    assert features[1].grad.any()


# ---------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.zeros(3, 8, 8)}, ValueError, r"input must be a Tensor\[B, C, H, W\], got shape \[3, 8, 8\]"),
        ({"input": torch.zeros(1, 3, 8, 8, dtype=torch.int32)}, TypeError, "input must be float16.*got torch.int32"),
        ({"input": [torch.zeros(1, 3, 8, 8)]}, TypeError, r"input must be a Tensor\[B, C, H, W\], got list"),
        ({"boxes": torch.zeros(2, 4)}, ValueError, r"boxes must be a Tensor\[K, 5\] or a list.*got shape \[2, 4\]"),
        ({"boxes": torch.zeros(2, 5, dtype=torch.int64)}, TypeError, "boxes must be floating point, got torch.int64"),
        ({"boxes": [torch.zeros(2, 5)]}, ValueError, r"boxes\[0\] must be a Tensor\[L, 4\], got \[2, 5\]"),
        ({"boxes": [[0.0, 0.0, 1.0, 1.0]]}, ValueError, r"boxes\[0\] must be a Tensor\[L, 4\], got list"),
        ({"boxes": torch.zeros(2, 5, device="meta")}, ValueError, "boxes must be on the device of the features, cpu"),
        ({"output_size": 0}, ValueError, "output_size must be a positive number or .*, got 0"),
        ({"output_size": (7, 7, 7)}, ValueError, r"output_size must be .*, got \(7, 7, 7\)"),
        ({"spatial_scale": 0.0}, ValueError, "spatial_scale must be positive and finite, got 0.0"),
        ({"boxes": [torch.zeros(1, 4)] * 3}, RuntimeError, r"rois\[2, 0\] is 2, but a batch index must be in \[0, 2\)"),
    ],
)
def test_roi_align_errors(change, error, message):
    arguments = {"input": torch.zeros(2, 3, 8, 8), "boxes": torch.zeros(2, 5), "output_size": 7} | change
    with pytest.raises(error, match=message):
        roi_align(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": []}, ValueError, "features must hold at least one level"),
        (
            {"features": [torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 4, 4)]},
            ValueError,
            r"features\[1\] must have the .*",
        ),
        ({"features": [torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 4, 4).half()]}, TypeError, "got torch.float16"),
        ({"rois": torch.zeros(3, 7, 4)}, ValueError, r"rois must be .* with B = 2 .*got \[3, 7, 4\]"),
        ({"rois": torch.zeros(7, 4)}, ValueError, r"rois must be a Tensor\[K, 5\] or Tensor\[B, R, 4\].*\[7, 4\]"),
        (
            {"spatial_scales": (0.5,)},
            ValueError,
            r"spatial_scales must hold 2 numbers, one for each level, got \[0.5\]",
        ),
        ({"box_scales": ()}, ValueError, "box_scales must hold at least one number"),
        ({"box_scales": (1.0, -1.0)}, ValueError, "box_scales must be positive and finite, got -1.0"),
        ({"level_rule": "other"}, ValueError, "level_rule must be one of torchvision, .* got 'other'"),
    ],
)
def test_multiscale_errors(change, error, message):
    arguments = {
        "features": [torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 4, 4)],
        "rois": torch.zeros(2, 5),
        "output_size": 7,
        "spatial_scales": (0.5, 0.25),
    } | change
    with pytest.raises(error, match=message):
        multiscale_roi_align(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: torch.zeros(2, 4)}, "rois must have size 5"),
        ({1: torch.zeros(2, 5).double()}, "rois must be Float"),
        ({2: [0.5]}, "spatial_scales must have one scale"),
        ({3: []}, "box_scales must hold"),
        ({4: [0, 7]}, "output_size must be positive"),
        ({0: [torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 4, 4)]}, "features must have size 3"),
    ],
)
def test_the_bare_operator_reads_nothing_out_of_place(change, message):
    from doublehead.ops._library import native

    if not native("pyramid_roi_align", "cpu"):
        pytest.skip("doublehead._C is not built: these are its checks")
    arguments = [[torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 4, 4)], torch.zeros(2, 5), *POOLING]
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        FORWARD(*arguments)
