"""Normalising, resizing and padding, and the way back."""

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import interpolate
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from doublehead.config import BackboneConfig, HeadConfig, ImageConfig, ModelConfig, Recipe
from doublehead.engine.checkpoint import save_model
from doublehead.models import build_detector
from doublehead.models.backbone import ResNetFPN
from doublehead.models.images import RESIZE_RULES, ImageTransform
from doublehead.models.structures import Detections

SIZES = [(120, 200), (211, 150), (97, 333)]


def test_batch_equals_torchvisions():
    torch.manual_seed(0)
    images = [torch.rand(3, *size) for size in SIZES]
    boxes = [torch.tensor([[3.0, 5, 80, 90]]), torch.zeros(0, 4), torch.tensor([[0.0, 0, 333, 97], [1, 2, 3, 4]])]
    labels = [torch.ones(len(b), dtype=torch.int64) for b in boxes]
    config = ImageConfig(min_size=(100,), max_size=180)
    theirs = GeneralizedRCNNTransform(100, 180, list(config.mean), list(config.std)).eval()
    targets = [{"boxes": b, "labels": x} for b, x in zip(boxes, labels, strict=True)]
    expected, expected_targets = theirs(images, targets)
    ours = ImageTransform(config).eval()
    batch, sizes = ours(images)
    assert sizes == expected.image_sizes
    torch.testing.assert_close(batch.pixels, expected.tensors)
    assert batch.sizes.tolist() == [list(map(float, size)) for size in sizes]
    found = ours.targets(targets, SIZES, sizes)
    for row, target in enumerate(expected_targets):
        torch.testing.assert_close(found.boxes[row][found.valid[row]], target["boxes"])


def test_uint8_and_float_images_give_the_same_batch():
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    transform = ImageTransform(ImageConfig(min_size=(64,), max_size=96))
    torch.testing.assert_close(transform([image])[0].pixels, transform([image / 255])[0].pixels)


def test_images_with_gradients_keep_values_and_gradients():
    transform = ImageTransform(ImageConfig(min_size=(32,), max_size=64))
    image = torch.rand(3, 40, 50)
    leaf = image.clone().requires_grad_()
    pixels = transform([leaf])[0].pixels
    torch.testing.assert_close(pixels, transform([image])[0].pixels)
    pixels.square().sum().backward()
    assert (leaf.grad != 0).float().mean() > 0.9


def test_the_batch_has_the_models_dtype():
    transform = ImageTransform(ImageConfig(min_size=(32,), max_size=64))
    images = [torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8), torch.rand(3, 30, 40).double()]
    expected = transform(images)[0].pixels
    assert expected.dtype == torch.float32
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        batch = transform.to(dtype)(images)[0]
        assert batch.pixels.dtype == dtype and batch.sizes.dtype == torch.float32
        torch.testing.assert_close(batch.pixels.float(), expected, atol=2e-2, rtol=1e-2)


def test_channels_in_reverse_order_have_their_own_means():
    config = ImageConfig(min_size=(32,), mean=(0.1, 0.2, 0.3), std=(0.5, 1, 2), channel_order="bgr")
    image = torch.tensor([1.0, 0.6, 0.2])[:, None, None].expand(3, 32, 32)  # red, green, blue
    pixels = ImageTransform(config)([image])[0].pixels
    torch.testing.assert_close(pixels[0, :, 5, 5], torch.tensor([(0.2 - 0.1) / 0.5, 0.6 - 0.2, (1 - 0.3) / 2]))


def test_a_canvas_is_filled_with_zeros_or_refused():
    transform = ImageTransform(ImageConfig(min_size=(32,), max_size=64))
    images = [torch.rand(3, 32, 40), torch.rand(3, 64, 32)]
    plain, sizes = transform(images)
    batch, again = transform(images, canvas=(96, 50))
    assert plain.pixels.shape == (2, 3, 64, 64) and batch.pixels.shape == (2, 3, 96, 50) and again == sizes
    for row, (height, width) in enumerate(sizes):
        assert torch.equal(batch.pixels[row, :, :height, :width], plain.pixels[row, :, :height, :width])
        assert (batch.pixels[row, :, height:] == 0).all() and (batch.pixels[row, :, :, width:] == 0).all()
    with pytest.raises(ValueError, match=r"images\[1\] is 64 x 32 pixels .* canvas of 63 x 64"):
        transform(images, canvas=(63, 64))
    with pytest.raises(ValueError, match=r"images\[0\] is 32 x 40 pixels"):
        transform(images, canvas=(64, 39))


# ---------------------------------------------------------------------------------------------
# The projects' ways to resize


def sides():
    """(height, width) of many images, thin ones and extremes among them."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(1, 4000, (300, 2), generator=generator).tolist()
    special = [
        (800, 1333),
        (1333, 800),
        (800, 800),
        (480, 640),
        (427, 640),
        (1, 1),
        (3, 5000),
        (1200, 1999),
        (333, 555),
    ]
    return [tuple(size) for size in drawn] + special


def resized(size, project, side=800, longest=1333):
    return RESIZE_RULES[project].size(size, side, longest)


def test_torchvisions_sizes_are_interpolates():
    for size in sides():
        factor = min(800 / min(size), 1333 / max(size))
        if min(size) * factor < 1:
            continue  # interpolate refuses it
        image = torch.empty(1, 1, *size, device="meta")
        expected = interpolate(image, scale_factor=factor, mode="bilinear", recompute_scale_factor=True).shape[2:]
        assert resized(size, "torchvision") == tuple(expected)


def test_detectron2s_and_mmdets_sizes_are_rounded_to_the_nearest():
    """Both scale by the same exact factor; only where a side lies beside a half may their floats decide."""
    for height, width in sides():
        short, long = min(height, width), max(height, width)
        factor = min(Fraction(800, short), Fraction(1333, long))
        for project in ("detectron2", "mmdet"):
            for found, exact in zip(resized((height, width), project), (height * factor, width * factor), strict=True):
                distance = abs(found - exact)
                assert distance < Fraction(1, 2) or abs(distance - Fraction(1, 2)) < Fraction(1, 10**9)
    assert resized((2, 3), "detectron2", 5, 100) == resized((2, 3), "mmdet", 5, 100) == (5, 8)  # 7.5, upwards
    assert resized((2, 3), "torchvision", 5, 100) == (5, 7)
    assert resized((600, 1000), "mmdet", 1333, 800) == (800, 1333)  # the larger number caps the long side


def test_maskrcnn_benchmarks_sizes():
    """The short side is exact or, under the cap, the nearest integer; the long side follows it, cut off."""
    for height, width in sides():
        short, long = min(height, width), max(height, width)
        side = 800 if long * 800 <= 1333 * short else round(Fraction(1333 * short, long))
        found = resized((height, width), "maskrcnn_benchmark")
        if side == 0:
            assert sorted(found) == [1, 1333]
        else:
            assert sorted(found) == [side, side * long // short] and (found[0] <= found[1]) == (height <= width)
    assert resized((600, 1000), "maskrcnn_benchmark") == (800, 1333)  # 1333.3 long with a short side of 800: capped
    assert resized((427, 640), "maskrcnn_benchmark") == (800, 1199)
    assert resized((427, 640), "detectron2") == (800, 1199) and resized((425, 640), "detectron2") == (800, 1205)
    assert resized((425, 640), "maskrcnn_benchmark") == (800, 1204)


@pytest.mark.parametrize("project", RESIZE_RULES)
def test_no_image_is_too_thin(project):
    config = ImageConfig(min_size=(32,), max_size=64, resize=project)
    batch, sizes = ImageTransform(config)([torch.rand(3, 1, 500), torch.rand(3, 500, 1)])
    assert sizes == [(1, 64), (64, 1)] and batch.pixels.isfinite().all()


def levels_of(project, image, side, longest=1000):
    """What the network would see, as levels `[h, w, 3]`."""
    config = ImageConfig(min_size=(side,), max_size=longest, mean=(0, 0, 0), std=(1 / 255,) * 3, resize=project)
    batch, ((height, width),) = ImageTransform(config)([image])
    return batch.pixels[0, :, :height, :width].permute(1, 2, 0).numpy()


def photo(height, width):
    """Smooth and noisy parts, as `[h, w, 3]` levels."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (max(2, height // 9), max(2, width // 9), 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.where(np.arange(width)[None, :, None] < width // 2, smooth, noise)


@pytest.mark.parametrize("project", ["detectron2", "maskrcnn_benchmark"])
@pytest.mark.parametrize("size, side", [((120, 90), 31), ((61, 80), 61), ((40, 60), 100), ((30, 210), 10)])
def test_pillows_filter_within_one_level(project, size, side):
    pixels = photo(*size)  # not a tall one: there some versions of Pillow begin with the other pass
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    for given in (image, image.contiguous(), image / 255):
        found = levels_of(project, given, side)
        expected = np.asarray(Image.fromarray(pixels).resize(found.shape[1::-1], Image.Resampling.BILINEAR))
        difference = np.abs(found - expected)
        assert np.abs(found - found.round()).max() < 1e-3  # whole levels
        assert difference.max() < 1.01 and difference.mean() < 0.02


@pytest.mark.parametrize("size, side, share", [((120, 90), 31, 0.01), ((40, 60), 100, 0.2)])
def test_pillows_filter_in_floating_point(size, side, share):
    """As on a GPU and with gradients; between sizes of a simple ratio many sums lie beside a half."""
    image = torch.from_numpy(photo(*size)).permute(2, 0, 1)
    expected = levels_of("detectron2", image, side)
    leaf = (image / 255).requires_grad_()
    config = ImageConfig(min_size=(side,), max_size=1000, mean=(0, 0, 0), std=(1 / 255,) * 3, resize="detectron2")
    pixels = ImageTransform(config)([leaf])[0].pixels[0, :, : expected.shape[0], : expected.shape[1]].permute(1, 2, 0)
    difference = np.abs(pixels.detach().numpy() - expected)
    assert difference.max() < 2.01 and (difference > 0.5).mean() < share
    pixels.sum().backward()
    assert (leaf.grad > 0).all()


def opencv_linear(pixels, size):
    """OpenCV's INTER_LINEAR for 8 bits, restated: weights of 1/2048, and in the vertical sum two terms are cut off."""

    def places(old, new):
        source = (np.arange(new) + 0.5) * (old / new) - 0.5
        first = np.floor(source).astype(int)
        weight = np.where((first < 0) | (first >= old - 1), 0, source - first)
        first = first.clip(0, old - 1)
        return first, (first + 1).clip(0, old - 1), np.rint(weight * 2048).astype(int)

    left, right, x = places(pixels.shape[1], size[1])
    top, bottom, y = places(pixels.shape[0], size[0])
    values = pixels.astype(int)
    rows = values[:, left] * (2048 - x)[None, :, None] + values[:, right] * x[None, :, None] >> 4
    return ((rows[top] * (2048 - y)[:, None, None] >> 16) + (rows[bottom] * y[:, None, None] >> 16) + 2) >> 2


@pytest.mark.parametrize("size, side", [((120, 90), 31), ((61, 80), 61), ((40, 60), 100), ((210, 30), 10)])
def test_opencvs_arithmetic_within_one_level(size, side):
    pixels = photo(*size)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    for given in (image, image / 255):
        found = levels_of("mmdet", given, side)
        difference = np.abs(found - opencv_linear(pixels, found.shape[:2]))
        assert np.abs(found - found.round()).max() < 1e-3
        assert difference.max() < 1.01 and difference.mean() < 0.16  # what is cut off is an eighth of a level


def test_the_ways_differ():
    image = torch.from_numpy(photo(120, 90)).permute(2, 0, 1)
    plain, opencv, pillow = (levels_of(project, image, 34) for project in ("torchvision", "mmdet", "detectron2"))
    assert 0 < np.abs(plain - opencv).max() <= 0.501 and np.abs(opencv - pillow).mean() > 5


@pytest.mark.gpu
@pytest.mark.parametrize("project", RESIZE_RULES)
def test_on_a_gpu_nothing_is_waited_for_and_the_batch_is_the_same(project):
    config = ImageConfig(min_size=(64,), max_size=100, resize=project, channel_order="bgr")
    images = [torch.from_numpy(photo(*size)).permute(2, 0, 1) for size in ((90, 120), (61, 40))]
    images.append(torch.rand(3, 50, 70))
    expected, sizes = ImageTransform(config)(images)
    transform = ImageTransform(config).cuda()
    images = [image.cuda() for image in images]
    transform(images)  # compiles, and pins its first memory
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch, again = transform(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert again == sizes and torch.equal(batch.sizes.cpu(), expected.sizes)
    level = 1 / 255 / min(config.std)
    tolerance = 1e-4 if project == "torchvision" else 2.01 * level  # sums beside a half
    torch.testing.assert_close(batch.pixels.cpu(), expected.pixels, atol=tolerance, rtol=0)


# ---------------------------------------------------------------------------------------------
# Boxes


def test_boxes_that_end_at_their_last_pixel_are_scaled_by_it():
    """As in maskrcnn-benchmark, whose (x1, y1, last x, last y) are multiplied by the ratio of the sizes."""
    transform = ImageTransform(ImageConfig(), legacy_boxes=True)
    source = torch.tensor([10.0, 20, 29, 59])  # in the batch, 100 x 100 pixels; the user's image has 50 x 200
    ratio = torch.tensor([2, 0.5, 2, 0.5])
    ours = torch.tensor([10.0, 20, 30, 60])
    found = Detections(ours[None, None], torch.tensor([[0.9]]), torch.tensor([[1]]), torch.tensor([1]))
    (result,) = transform.detections(found, before=[(50, 200)], after=[(100, 100)])
    expected = source * ratio + torch.tensor([0, 0, 1, 1])
    assert result["boxes"].tolist() == [expected.tolist()] == [[20.0, 10.0, 59.0, 30.5]]
    target = {"boxes": result["boxes"], "labels": torch.tensor([1])}
    back = transform.targets([target], before=[(50, 200)], after=[(100, 100)])
    torch.testing.assert_close(back.boxes[0, 0], ours)


def test_boxes_narrower_than_a_pixel_stay_boxes():
    """As in maskrcnn-benchmark, where a box's last pixel is never before its first."""
    target = {"boxes": torch.tensor([[10.0, 20, 10.2, 40], [5, 6, 15, 6.5]]), "labels": torch.tensor([1, 1])}
    legacy = ImageTransform(ImageConfig(), legacy_boxes=True).targets([target], [(100, 100)], [(300, 300)]).boxes[0]
    assert legacy[:, :2].tolist() == [[30, 60], [15, 18]]
    assert (legacy[:, 2:] - legacy[:, :2]).tolist() == [[1, 58], [28, 1]]
    exact = ImageTransform(ImageConfig()).targets([target], [(100, 100)], [(300, 300)]).boxes[0]
    torch.testing.assert_close(exact, 3 * target["boxes"])


def test_detections_return_to_the_users_pixels():
    transform = ImageTransform(ImageConfig())
    boxes = torch.tensor([[[10.0, 20, 30, 40], [0, 0, 0, 0]]])
    found = Detections(boxes, torch.tensor([[0.9, 0]]), torch.tensor([[2, 0]]), torch.tensor([1]))
    result = transform.detections(found, before=[(50, 200)], after=[(100, 100)])
    assert result[0]["boxes"].tolist() == [[20.0, 10.0, 60.0, 20.0]]
    assert result[0]["labels"].tolist() == [2]


def test_multi_scale_draws_in_training_and_takes_the_last_at_test():
    transform = ImageTransform(ImageConfig(min_size=(32, 64, 96), max_size=200))
    image = [torch.rand(3, 40, 40)]
    torch.manual_seed(0)
    drawn = {transform.train()(image)[1][0][0] for _ in range(40)}
    assert drawn == {32, 64, 96}
    assert {transform.eval()(image)[1][0][0] for _ in range(5)} == {96}


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "at least one image"),
        ([torch.rand(1, 20, 20)], r"images\[0\].*\(1, 20, 20\)"),
        ([torch.rand(3, 20, 20), torch.rand(20, 20)], r"images\[1\]"),
        ([torch.zeros(3, 20, 20, dtype=torch.int64)], "int64"),
        ([torch.rand(3, 0, 20)], r"images\[0\]"),
    ],
)
def test_bad_images_are_named(images, message):
    with pytest.raises(ValueError, match=message):
        ImageTransform(ImageConfig(min_size=(32,)))(images)


@pytest.fixture(scope="module")
def model():
    backbone = BackboneConfig("resnet18", "batch_norm", weights=None, frozen_stages=0, fpn_channels=16)
    head = HeadConfig("fc", fc_dim=8)
    return build_detector(ModelConfig(backbone=backbone, head=head, image=ImageConfig(min_size=(64,))), 3).train()


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (None, "one per image"),
        ([], "one per image"),
        ([{"boxes": torch.zeros(2, 5), "labels": torch.ones(2).long()}], r"targets\[0\]"),
        ([{"boxes": torch.zeros(2, 4), "labels": torch.ones(3).long()}], r"targets\[0\]"),
        ([{"boxes": torch.zeros(1, 4), "labels": torch.tensor([3])}], "labels in 1 .. 2"),
        ([{"boxes": torch.zeros(1, 4), "labels": torch.tensor([0])}], "labels in 1 .. 2"),
        ([{"boxes": torch.zeros(1, 4)}], "labels"),
    ],
)
def test_bad_targets_are_named(model, targets, message):
    with pytest.raises(ValueError, match=message):
        model([torch.rand(3, 64, 64)], targets)


def test_a_missing_weights_file_is_named():
    config = ModelConfig(backbone=BackboneConfig("resnet18", weights="/nowhere/resnet18.pt"))
    with pytest.raises(FileNotFoundError, match="/nowhere/resnet18.pt"):
        build_detector(config, 3)


def test_backbone_weights_from_a_file(tmp_path):
    import torchvision

    torch.manual_seed(0)
    resnet = torchvision.models.resnet18(weights=None)
    torch.save(resnet.state_dict(), tmp_path / "resnet18.pt")
    config = BackboneConfig("resnet18", weights=str(tmp_path / "resnet18.pt"), fpn_channels=16)
    body = build_detector(ModelConfig(backbone=config, head=HeadConfig("fc", fc_dim=8)), 3).detector.backbone.body
    torch.testing.assert_close(body["layer3"][1].conv2.weight, resnet.layer3[1].conv2.weight)
    torch.save({"conv1.weight": resnet.conv1.weight.data}, tmp_path / "part.pt")
    bad = ModelConfig(backbone=BackboneConfig("resnet18", weights=str(tmp_path / "part.pt")))
    with pytest.raises(ValueError, match="missing"):
        build_detector(bad, 3)


def test_backbone_weights_from_a_detector(tmp_path):
    """As fine-tuning does: body and pyramid are taken, live batch norms may become frozen ones."""
    small = BackboneConfig("resnet18", "batch_norm", weights=None, fpn_channels=16, fpn_norm=True)
    recipe = Recipe(model=ModelConfig(backbone=small, head=HeadConfig("fc", fc_dim=8)))
    trained = build_detector(recipe.model, 3)
    path = tmp_path / "model.safetensors"
    save_model(path, trained, recipe, ["a", "b"], [1, 2], 0)
    frozen = dataclasses.replace(small, norm="frozen_batch_norm", weights=str(path))
    model = build_detector(ModelConfig(backbone=frozen, head=HeadConfig("conv", conv_dim=16)), 7).detector.backbone
    pixels = torch.rand(1, 3, 64, 64)
    for found, expected in zip(model.eval()(pixels), trained.eval().detector.backbone(pixels), strict=True):
        torch.testing.assert_close(found, expected)

    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            build_detector(ModelConfig(backbone=dataclasses.replace(frozen, **changes), head=HeadConfig("fc")), 3)

    save_file({"detector.backbone.body.conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "other.safetensors")
    refused("does not fit.*size mismatch", fpn_channels=32)
    refused("does not fit: missing", norm="batch_norm", fpn_norm=False, weights=str(tmp_path / "other.safetensors"))
    refused("only start a backbone with neck 'fpn'", neck="none")
    path.write_bytes(path.read_bytes()[:1000])
    refused("not a safetensors file, or truncated")


@pytest.mark.parametrize("norm, kind", [("batch_norm", nn.BatchNorm2d), ("group_norm", nn.GroupNorm)])
def test_the_pyramid_is_normalised_where_asked(norm, kind):
    def pyramid(fpn_norm):
        config = BackboneConfig("resnet18", norm, weights=None, fpn_channels=32, fpn_norm=fpn_norm)
        return ResNetFPN(config).fpn

    assert sum(isinstance(module, kind) for module in pyramid(True).modules()) == 8  # 4 lateral, 4 output convolutions
    assert not any(isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)) for module in pyramid(False).modules())
