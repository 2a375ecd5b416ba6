"""What a user hands to the model: targets from which nothing can be learnt, and images that are none, are named."""

import math
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from doublehead.config import BackboneConfig, HeadConfig, ImageConfig, ModelConfig
from doublehead.models import build_detector
from doublehead.models.images import ImageTransform


@pytest.fixture(scope="module")
def model():
    backbone = BackboneConfig("resnet18", "batch_norm", weights=None, frozen_stages=0, fpn_channels=16)
    head = HeadConfig("fc", fc_dim=8)
    return build_detector(ModelConfig(backbone=backbone, head=head, image=ImageConfig(min_size=(64,))), 3).train()


GOOD = {"boxes": torch.tensor([[5.0, 5, 40, 40]]), "labels": torch.tensor([1])}


@pytest.mark.parametrize(
    ("box", "said"),
    [
        ([5, 5, 5, 40], r"\[5, 5, 5, 40\].*x1 < x2 and y1 < y2"),
        ([5, 40, 40, 5], r"\[5, 40, 40, 5\].*x1 < x2 and y1 < y2"),
        ([60, 50, 20, 30], r"\[60, 50, 20, 30\].*boxes of \(x, y, width, height\) are to be converted"),
        ([5, math.nan, 30, 40], r"\[5, nan, 30, 40\].*every number finite"),
        ([5, 5, math.inf, 40], r"\[5, 5, inf, 40\].*every number finite"),
        ([-math.inf, 5, math.inf, 40], r"\[-inf, 5, inf, 40\].*every number finite"),
        ([1e9, 5, 1e9 + 1, 40], r"\[1e\+09, 5, 1e\+09, 40\].*by more than float32 can lose"),
    ],
)
def test_boxes_that_cannot_be_learnt_are_named(model, box, said):
    boxes = torch.tensor([[5.0, 5, 40, 40], [1, 1, 2, 2], box], dtype=torch.float64)
    wrong = {"boxes": boxes, "labels": torch.tensor([1, 1, 2])}
    with pytest.raises(ValueError, match=r"^targets\[1\]: boxes\[2\] is " + said):
        model([torch.rand(3, 64, 64)] * 2, [GOOD, wrong])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float16, torch.float64])
def test_boxes_of_any_dtype_over_the_border_and_labels_of_any_width(model, dtype):
    boxes = torch.tensor([[-5, -5, 90, 40], [70, 70, 90, 99]], dtype=dtype)
    for width in (torch.uint8, torch.uint16, torch.uint64):
        targets = [{"boxes": boxes, "labels": torch.tensor([1, 2], dtype=width)}, GOOD]
        assert torch.isfinite(sum(model(torch.rand(2, 3, 64, 64), tuple(targets)).values()))  # images as one tensor


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (GOOD, TypeError, "targets: expected a list of a dict for each image, got one dict: put it into a list"),
        ((target for target in [GOOD]), TypeError, "targets: expected a list of a dict for each image, got generator"),
        ([[GOOD]], TypeError, r"targets\[0\]: expected a dict with 'boxes' and 'labels', got list"),
        ([GOOD | {"boxes": [[5, 5, 40, 40]]}], TypeError, r"targets\[0\]\['boxes'\]: expected a tensor, got list;"),
        ([GOOD | {"labels": GOOD["labels"].numpy()}], TypeError, r"targets\[0\]\['labels'\]: .* got ndarray"),
        ([GOOD | {"labels": torch.tensor([1.0])}], ValueError, r"targets\[0\]: expected labels of integers"),
        ([GOOD | {"boxes": GOOD["boxes"].bool()}], ValueError, r"targets\[0\]: expected boxes of floats or integers"),
        ([{"boxes": GOOD["boxes"]}], ValueError, r"targets\[0\]: labels missing, got \['boxes'\]"),
    ],
)
def test_targets_of_another_form(model, targets, error, message):
    with pytest.raises(error, match=message):
        model([torch.rand(3, 64, 64)], targets)


ARRAY = np.zeros((64, 48, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([ARRAY], TypeError, r"images\[0\]: .* got ndarray; torch.from_numpy\(array\).permute\(2, 0"),
        ([Image.fromarray(ARRAY)], TypeError, r"images\[0\]: .* got Image; .*numpy.array\(image.convert\('RGB'\)\)"),
        (ARRAY, TypeError, r"images: expected a list of Tensor\[3, H, W\], got ndarray; torch.from_numpy"),
        (Image.fromarray(ARRAY), TypeError, "images: expected a list .* got Image"),
        (["picture.jpg"], TypeError, r"images\[0\]: expected a Tensor\[3, H, W\], got str$"),
        ("picture.jpg", TypeError, r"images: expected a list of Tensor\[3, H, W\], got str$"),
        (None, TypeError, r"images: expected a list of Tensor\[3, H, W\], got NoneType$"),
        (torch.rand(3, 64, 48), ValueError, r"images: expected a list .*, got shape \(3, 64, 48\)$"),
        ([torch.rand(64, 48, 3)], ValueError, r"got shape \(64, 48, 3\): image.permute\(2, 0, 1\) brings"),
        ([torch.rand(64, 48)], ValueError, r"got shape \(64, 48\): image.expand\(3, -1, -1\) makes three"),
        ([torch.rand(1, 64, 48)], ValueError, r"got shape \(1, 64, 48\): image.expand\(3, -1, -1\) makes three"),
        ([torch.rand(4, 64, 48)], ValueError, r"got shape \(4, 64, 48\): image\[:3\] leaves out"),
        ([torch.zeros(3, 64, 48, dtype=torch.int64)], ValueError, "expected uint8 or a floating dtype"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_what_is_no_image(model, training, images, error, message):
    model.train(training)
    with pytest.raises(error, match=message):
        model(images, [GOOD])
    model.train()


@pytest.mark.parametrize("levels", [torch.rand(3, 64, 64) * 255, (torch.rand(3, 64, 64) - 0.485) / 0.225 - 1])
def test_levels_that_cannot_be_meant_are_said_once(levels):
    transform = ImageTransform(ImageConfig(min_size=(64,)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transform([torch.rand(3, 64, 64), levels.to(torch.uint8)])
        with pytest.raises(UserWarning, match=r"^images\[1\]: floating images are taken as levels in 0..1, .* by 255"):
            transform([torch.rand(3, 64, 64), levels])
        transform([levels])


@pytest.mark.parametrize("norm", ["batch_norm", "frozen_batch_norm", "group_norm"])
def test_one_image_too_small_for_the_statistics_of_batch_norm(norm):
    backbone = BackboneConfig("resnet18", norm, weights=None, frozen_stages=0, fpn_channels=64, fpn_norm=True)
    image = ImageConfig(min_size=(32,), max_size=32)
    model = build_detector(ModelConfig(backbone=backbone, head=HeadConfig("fc", fc_dim=8), image=image), 3).train()
    tiny, target = torch.rand(3, 16, 12), {"boxes": torch.tensor([[1.0, 1, 9, 9]]), "labels": torch.tensor([1])}
    if norm == "batch_norm":
        with pytest.raises(ValueError, match=r"^images: of one image of 32 x 32 pixels .* single cell.*backbone.norm"):
            model([tiny], [target])
    else:
        assert torch.isfinite(sum(model([tiny], [target]).values()))
    assert torch.isfinite(sum(model([tiny] * 2, [target] * 2).values()))
    model.detector.backbone.eval()
    assert torch.isfinite(sum(model([tiny], [target]).values()))  # those whose statistics stand have enough
