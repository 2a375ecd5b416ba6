"""Normalising, resizing and padding, and the way back."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from doublehead.config import BackboneConfig, HeadConfig, ImageConfig, ModelConfig, Recipe
from doublehead.engine.checkpoint import save_model
from doublehead.models import build_detector
from doublehead.models.backbone import ResNetFPN
from doublehead.models.images import ImageTransform
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
