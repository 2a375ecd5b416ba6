"""Several levels and box scales in one call, the level rules, and torchvision's MultiScaleRoIAlign."""

import math

import pytest
import torch
import torchvision
from torch import Tensor
from torchvision.ops.poolers import LevelMapper

from doublehead.ops import MultiScaleRoIAlign, multiscale_roi_align, roi_align
from doublehead.ops.roi_align import reference
from doublehead.ops.roi_align.level_rules import LEVEL_RULES
from doublehead.ops.roi_align.pooling import Pooling

SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
LAYOUTS = [torch.contiguous_format, torch.channels_last]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])


def make_pyramid(images: int = 2, channels: int = 18, height: int = 96, width: int = 160, **options) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    layout = options.pop("layout", torch.contiguous_format)
    return [
        torch.randn(images, channels, -(-height // step), -(-width // step), generator=generator)
        .to(**options)
        .contiguous(memory_format=layout)
        for step in (4, 8, 16, 32)
    ]


def make_boxes(count: int, height: int = 96, width: int = 160, seed: int = 0) -> Tensor:
    """Sides from 8 to 640 pixels, so that every level has its share; many reach over the map's edge."""
    generator = torch.Generator().manual_seed(seed)
    side = 8 * torch.exp(torch.rand(count, 1, generator=generator) * math.log(80))
    aspect = torch.exp(torch.randn(count, 1, generator=generator) * 0.4)
    centre = torch.rand(count, 2, generator=generator) * torch.tensor([width, height])
    half = torch.cat([side * aspect, side / aspect], 1) / 2
    return torch.cat([centre - half, centre + half], 1)


def constant_pyramid(levels: int = 4) -> list[Tensor]:
    """Every pixel holds the number of its level."""
    return [torch.full((1, 1, 512 >> level, 512 >> level), float(level)) for level in range(levels)]


def levels_used(boxes: Tensor, level_rule: str, levels: int = 4) -> Tensor:
    rois = torch.nn.functional.pad(boxes, (1, 0))
    (output,) = multiscale_roi_align(
        constant_pyramid(levels), rois, 1, spatial_scales=SCALES[:levels], sampling_ratio=1, level_rule=level_rule
    )  # one sample, at the box's centre
    return output.flatten().long()


def square(side: float) -> Tensor:
    return torch.tensor([[0.0, 0.0, side, side]])


# ---------------------------------------------------------------------------------------------
# Level rules


def test_torchvision_level_of_any_box():
    boxes = make_boxes(20_000, 64, 64)
    expected = LevelMapper(2, 5)([boxes])
    assert expected.unique().tolist() == [0, 1, 2, 3]
    assert torch.equal(levels_used(boxes, "torchvision"), expected)


@pytest.mark.parametrize("boundary", [112.0, 224.0, 448.0])
def test_torchvision_level_next_to_a_boundary(boundary):
    """Also a few units in the last place away, where floor(4 + log2(side / 224) + 1e-6) rounds up."""
    sides, down, up = [boundary], boundary, boundary
    for _ in range(40):
        down = torch.nextafter(torch.tensor(down), torch.tensor(0.0)).item()
        up = torch.nextafter(torch.tensor(up), torch.tensor(1e9)).item()
        sides += [down, up]
    sides += [boundary - 0.01, boundary - 1, boundary + 0.01, boundary + 1]
    boxes = torch.cat([square(side) for side in sides])
    assert torch.equal(levels_used(boxes, "torchvision"), LevelMapper(2, 5)([boxes]))


@pytest.mark.parametrize(
    ("level_rule", "side", "level"),
    [
        ("torchvision", 111.9, 0), ("torchvision", 111.99995, 1), ("torchvision", 112, 1), ("torchvision", 448, 3),
        ("detectron2", 111.9, 0), ("detectron2", 111.99995, 0), ("detectron2", 112, 1), ("detectron2", 448, 3),
        ("mmdet", 111.9, 0), ("mmdet", 111.9995, 0), ("mmdet", 111.99999, 1), ("mmdet", 112, 1), ("mmdet", 224, 2),
        ("mmdet", 447, 2), ("mmdet", 448, 3), ("torchvision", 3, 0), ("mmdet", 3, 0), ("mmdet", 2000, 3),
        ("detectron2", 0, 0), ("torchvision", 0, 0), ("mmdet", 0, 0), ("maskrcnn_benchmark", 0, 0),
        ("maskrcnn_benchmark", 111.999, 0), ("maskrcnn_benchmark", 111.99995, 1), ("maskrcnn_benchmark", 448, 3),
    ],
)  # fmt: skip
def test_level_rules(level_rule, side, level):
    assert levels_used(square(side), level_rule).item() == level
    pooling = Pooling(SCALES, (1.0,), (1, 1), 1, False, 224, 4, *LEVEL_RULES[level_rule])
    assert reference.box_levels(square(side), pooling).item() == level


@pytest.mark.parametrize("box_scale", [1.0, 1.3])
def test_maskrcnn_benchmark_samples_to_the_last_pixel(box_scale):
    """Boxes there end at their last pixel: the level is that of the whole box, the samples end a pixel earlier."""
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(1, 3, side, side, generator=generator, requires_grad=True) for side in (64, 32)]
    boxes = torch.tensor([[10.0, 12, 60, 71], [0, 0, 111.5, 112.5], [5, 5, 6, 6], [30, 20, 180, 210]])
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2 * box_scale
    sampled = torch.cat([centre - half, centre + half - 1], 1)
    fine = ((boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt() < 112)[:, None, None, None]
    expected = torch.where(fine, *(roi_align(features[i], [sampled], 7, 1 / (4 * 2**i), 2) for i in (0, 1)))
    (pooled,) = multiscale_roi_align(
        features, torch.nn.functional.pad(boxes, (1, 0)), 7, spatial_scales=SCALES[:2], box_scales=(box_scale,),
        level_rule="maskrcnn_benchmark",
    )  # fmt: skip
    torch.testing.assert_close(pooled, expected)
    grads = [torch.autograd.grad(output.square().sum(), features) for output in (pooled, expected)]
    torch.testing.assert_close(*grads)


def test_levels_begin_with_the_first_one_given():
    output = multiscale_roi_align(
        constant_pyramid(2), torch.nn.functional.pad(square(200), (1, 0)), 1, spatial_scales=[1 / 8, 1 / 16]
    )
    assert output[0].item() == 0  # level 3, the first here
    output = multiscale_roi_align(
        constant_pyramid(2),
        torch.nn.functional.pad(square(200), (1, 0)),
        1,
        spatial_scales=[1 / 8, 1 / 16],
        canonical_size=100,
    )
    assert output[0].item() == 1  # 200 pixels are level 5 now, beyond the last one


@layouts
def test_box_without_a_level_pools_zeros(layout):
    features = [feature.requires_grad_() for feature in make_pyramid(layout=layout)]
    rois = torch.tensor([[0.0, torch.nan, 0, 9, 9], [0, 9, 0, 0, 9], [1, 0, 0, 90, 90]])
    (output,) = multiscale_roi_align(features, rois, 7, spatial_scales=SCALES)
    assert not output[:2].any()
    assert output[2].any()
    output[:2].sum().backward()
    assert not any(feature.grad.any() for feature in features)


def test_single_level_takes_inverted_boxes_as_torchvision_does():
    feature, rois = make_pyramid()[0], torch.tensor([[0.0, 40, 8, 12, 60]])
    (output,) = multiscale_roi_align([feature], rois, 7, spatial_scales=[1 / 4])
    torch.testing.assert_close(output, torchvision.ops.roi_align(feature, rois, 7, 1 / 4, 2), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------
# Pooling


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("output_size", [(7, 7), (14, 14), (3, 5)], ids=str)
def test_pyramid_and_box_scales_against_the_reference(output_size, dtype, layout):
    features = make_pyramid(layout=layout, dtype=dtype)
    rois = torch.cat([torch.arange(24.0)[:, None] % 2, make_boxes(24)], 1)
    pooling = SCALES, (1.0, 1.3), output_size, 2, False, 224.0, 4, *LEVEL_RULES["torchvision"]
    grads = [torch.randn(24, 18, *output_size).to(dtype) for _ in range(2)]

    def run(function, features, rois):
        leaves = [feature.detach().requires_grad_() for feature in features]
        outputs = function(leaves, rois)
        wanted = [grad.to(outputs[0].dtype) for grad in grads]
        return *(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, wanted)

    def ours(features, rois):
        return multiscale_roi_align(features, rois, output_size, spatial_scales=SCALES, box_scales=(1.0, 1.3))

    def plainly(features, rois):
        return reference.multiscale_roi_align(features, rois, Pooling(*pooling))

    actual = run(ours, features, rois)
    plain = run(plainly, features, rois.to(torch.float64 if dtype == torch.float64 else torch.float32))
    exact = run(plainly, [feature.double() for feature in features], rois.double())
    for result, same_dtype, best in zip(actual, plain, exact, strict=True):
        assert result.is_contiguous(memory_format=layout)
        if dtype == torch.float64:
            torch.testing.assert_close(result, best, rtol=1e-12, atol=1e-12)
        else:
            error, allowed = (result.double() - best).abs().max(), 2 * (same_dtype.double() - best).abs().max()
            assert error <= allowed


@layouts
def test_each_box_scale_is_a_box_expanded_about_its_centre_on_the_same_level(layout):
    features, boxes = make_pyramid(layout=layout), make_boxes(30)
    rois = torch.nn.functional.pad(boxes, (1, 0))
    outputs = multiscale_roi_align(features, rois, 7, spatial_scales=SCALES, box_scales=(1.3, 1.0, 0.5))
    levels = LevelMapper(2, 5)([boxes])
    centres, halves = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    for factor, output in zip((1.3, 1.0, 0.5), outputs, strict=True):
        expanded = torch.cat([torch.zeros(30, 1), centres - halves * factor, centres + halves * factor], 1)
        for level, (feature, scale) in enumerate(zip(features, SCALES, strict=True)):
            expected = torchvision.ops.roi_align(feature, expanded[levels == level], 7, scale, 2)
            torch.testing.assert_close(output[levels == level], expected, rtol=1e-4, atol=1e-4)


def test_unused_output_has_no_part_in_the_gradient():
    features = [feature.requires_grad_() for feature in make_pyramid()]
    rois = torch.nn.functional.pad(make_boxes(9), (1, 0))
    first, _ = multiscale_roi_align(features, rois, 7, spatial_scales=SCALES, box_scales=(1.0, 1.3))
    (alone,) = multiscale_roi_align(features, rois, 7, spatial_scales=SCALES)
    actual = torch.autograd.grad(first.sum(), features)
    for ours, expected in zip(actual, torch.autograd.grad(alone.sum(), features), strict=True):
        assert torch.equal(ours, expected)


@layouts
def test_padded_boxes_are_rows_of_their_images(layout):
    features, boxes = make_pyramid(layout=layout), torch.stack([make_boxes(5), make_boxes(5, seed=1)])
    rois = torch.cat([torch.arange(2.0).repeat_interleave(5)[:, None], boxes.flatten(0, 1)], 1)
    (padded,) = multiscale_roi_align(features, boxes, 7, spatial_scales=SCALES)
    assert torch.equal(padded, multiscale_roi_align(features, rois, 7, spatial_scales=SCALES)[0])


@layouts
def test_level_without_boxes_has_a_gradient(layout):
    features = [feature.requires_grad_() for feature in make_pyramid(layout=layout)]
    rois = torch.tensor([[1.0, 2, 3, 30, 40]])
    (output,) = multiscale_roi_align(features, rois, 7, spatial_scales=SCALES)
    output.sum().backward()
    assert features[0].grad.any()
    for feature in features[1:]:
        assert feature.grad is not None
        assert not feature.grad.any()


def test_levels_of_different_layouts():
    features = make_pyramid()
    rois = torch.nn.functional.pad(make_boxes(12), (1, 0))
    (expected,) = multiscale_roi_align(features, rois, 7, spatial_scales=SCALES)
    mixed = [f.contiguous(memory_format=LAYOUTS[i % 2]) for i, f in enumerate(features)]
    torch.testing.assert_close(multiscale_roi_align(mixed, rois, 7, spatial_scales=SCALES)[0], expected)
    (output,) = multiscale_roi_align(mixed[1:], rois, 7, spatial_scales=SCALES[1:])
    assert output.is_contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------
# MultiScaleRoIAlign


@layouts
@pytest.mark.parametrize(("output_size", "sampling_ratio"), [(7, 2), ((3, 5), 2), (14, -1), ([2, 2], 1)], ids=str)
def test_module_equals_torchvision(output_size, sampling_ratio, layout):
    features = make_pyramid(dtype=torch.float64, layout=layout)
    x = dict(zip(["0", "1", "other", "2", "3"], [*features[:2], features[0], *features[2:]], strict=True))
    boxes = [make_boxes(15).double(), make_boxes(9, seed=1).double()]
    arguments = list("0123"), output_size, sampling_ratio
    shapes = [(96, 150), (80, 160)]
    results = []
    for module in (MultiScaleRoIAlign(*arguments), torchvision.ops.MultiScaleRoIAlign(*arguments)):
        leaves = {name: feature.detach().requires_grad_() for name, feature in x.items()}
        output = module(leaves, boxes, shapes)
        grads = torch.autograd.grad(output.sin().sum(), [leaves[name] for name in "0123"])
        results.append((repr(module), output.detach(), *grads))
    (name, *ours), (expected_name, *theirs) = results
    assert name == expected_name
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_module_takes_canonical_scale_and_level():
    boxes, options = [make_boxes(40)], {"canonical_scale": 60, "canonical_level": 3}
    x = dict(zip("0123", make_pyramid(images=1), strict=True))
    ours, theirs = (
        module(list("0123"), 5, 2, **options)(x, boxes, [(96, 160)])
        for module in (MultiScaleRoIAlign, torchvision.ops.MultiScaleRoIAlign)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(20, 2000), (2000, 20), (1, 700)])
def test_very_oblong_image(height, width):
    """Padded to whole pixels of the coarsest level, as detectors do: the short side says nothing about the scale."""
    padded = [-(-height // 32) * 32, -(-width // 32) * 32]
    x = {str(i): torch.randn(1, 4, padded[0] // s, padded[1] // s) for i, s in enumerate((4, 8, 16, 32))}
    boxes = torch.tensor([[1.0, 1, 15, 14], [1, 1, 15, 19]])
    output = MultiScaleRoIAlign(list("0123"), 7, 2)(x, [boxes], [(height, width)])
    expected = roi_align(x["0"], [boxes], 7, 1 / 4, 2)
    assert torch.equal(output, expected)


def test_module_follows_the_image_sizes_of_each_call():
    module = MultiScaleRoIAlign(["0"], 7, 2)
    x = {"0": torch.randn(1, 4, 32, 32)}
    boxes = [torch.tensor([[2.0, 3, 20, 21]])]
    for size in (128, 256):
        assert torch.equal(module(x, boxes, [(size, size)]), roi_align(x["0"], boxes, 7, 32 / size, 2))


def test_module_errors():
    module = MultiScaleRoIAlign(["0"], 7, 2)
    with pytest.raises(ValueError, match="featmap_names"):
        module({"1": torch.zeros(1, 4, 8, 8)}, [torch.zeros(1, 4)], [(32, 32)])
    with pytest.raises(ValueError, match="image_shapes"):
        module({"0": torch.zeros(1, 4, 8, 8)}, [torch.zeros(1, 4)], [])


def test_module_without_boxes():
    x = {name: feature.requires_grad_() for name, feature in zip("0123", make_pyramid(), strict=True)}
    output = MultiScaleRoIAlign(list("0123"), (2, 3), 2)(x, [torch.zeros(0, 4)] * 2, [(96, 160)] * 2)
    assert output.shape == (0, 18, 2, 3)
    output.sum().backward()
    assert all(not feature.grad.any() for feature in x.values())
