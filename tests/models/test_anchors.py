"""Anchors as the projects make them: against torchvision's own, published tables, and formulas written out."""

from dataclasses import replace

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from doublehead.config import RPNConfig
from doublehead.models.anchors import Anchors, exact_anchors, legacy_anchors
from doublehead.models.rpn import RPN
from doublehead.models.structures import ImageBatch

STRIDES = (4, 8, 16, 32, 64)


def features(height: int, width: int) -> list[torch.Tensor]:
    return [torch.zeros(2, 1, -(-height // stride), -(-width // stride)) for stride in STRIDES]


@pytest.mark.parametrize("size", [(128, 192), (96, 800)])  # 96 / 64: P6 has two rows, 48 pixels apart
def test_rounded_anchors_are_torchvisions(size):
    maps = features(*size)
    theirs = AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5)
    expected = theirs(ImageList(torch.zeros(2, 3, *size), [size, size]), maps)[0]
    assert torch.equal(torch.cat(Anchors(RPNConfig(), STRIDES)(maps, size)), expected)


def test_exact_anchors_of_one_cell():
    """Detectron2: width sqrt(size^2 / ratio), height ratio * width; MMDetection: the same for stride x 8."""
    expected = [[-(w := (64**2 / ratio) ** 0.5) / 2, -w * ratio / 2, w / 2, w * ratio / 2] for ratio in (0.5, 1.0, 2.0)]
    torch.testing.assert_close(exact_anchors(64, (0.5, 1.0, 2.0), 8), torch.tensor(expected))


def test_legacy_anchors_are_the_published_table():
    """Faster R-CNN's first release (stride 16, sizes 128, 256, 512), which counts pixels from 1 to the last."""
    table = """-83 -39 100 56  -175 -87 192 104  -359 -183 376 200
               -55 -55 72 72   -119 -119 136 136  -247 -247 264 264
               -35 -79 52 96   -79 -167 96 184    -167 -343 184 360"""
    table = torch.tensor([float(word) for word in table.split()]).view(3, 3, 4)  # ratio, size
    found = torch.stack([legacy_anchors(size, (0.5, 1.0, 2.0), 16) for size in (128, 256, 512)], dim=1)
    assert torch.equal(found + torch.tensor([1.0, 1, 0, 0]), table)


@pytest.mark.parametrize("anchors", ["exact", "legacy"])
def test_strides_are_fixed_where_torchvisions_follow_the_image(anchors):
    height, width = 96, 800
    of_levels = Anchors(RPNConfig(anchors=anchors), STRIDES)(features(height, width), (height, width))
    for stride, level in zip(STRIDES, of_levels, strict=True):
        cells = level.view(-(-height // stride), -(-width // stride), 3, 4)
        centres = (cells[..., :2] + cells[..., 2:]) / 2
        offset = stride / 2 if anchors == "legacy" else 0
        assert torch.allclose(centres[1, 2, 0], torch.tensor([2.0 * stride, stride]) + offset)


def test_wrong_configurations_are_named():
    with pytest.raises(ValueError, match="rpn.anchors: expected one of rounded, exact, legacy, got 'other'"):
        Anchors(RPNConfig(anchors="other"), STRIDES)
    with pytest.raises(ValueError, match="'legacy' anchors need a pyramid"):
        Anchors(RPNConfig(anchors="legacy"), (16,))
    with pytest.raises(ValueError, match="one for each of 4 levels, got 5"):
        Anchors(RPNConfig(), STRIDES[:4])


def proposals(config: RPNConfig, logits: torch.Tensor, min_side: float = 0.0, shift: float = 0.0) -> torch.Tensor:
    """What an RPN with two levels makes of these logits `[H, W]` of its only anchor of level one, moved by `shift`."""
    rpn = RPN(config, 1, (4, 8), min_side).eval()
    maps = [torch.zeros(1, 1, *logits.shape), torch.zeros(1, 1, 1, 1)]
    fine = (logits.flatten()[None], torch.tensor([shift, 0, 0, 0]).repeat(1, logits.numel(), 1))
    coarse = (torch.full((1, 1), -50.0), torch.zeros(1, 1, 4))
    rpn.predict = lambda feature: coarse if feature is maps[1] else fine
    images = ImageBatch(torch.zeros(1, 3, 4 * logits.shape[0], 4 * logits.shape[1]), torch.tensor([[16.0, 16.0]]))
    found, _ = rpn(images, maps)
    return found.boxes[0][found.valid[0]]


def test_legacy_boxes_outside_of_the_image_keep_a_pixel():
    config = RPNConfig((8, 16), (1.0,), anchors="legacy", nms_iou=1.0, min_size=0.0)
    right = proposals(config, torch.zeros(4, 4), min_side=1.0, shift=9.0)
    assert (right[:-1, 0] == 15).all() and (right[:-1, 2] == 16).all()
    none = proposals(replace(config, min_size=1e-3), torch.zeros(4, 4), min_side=0.0, shift=9.0)
    assert len(none) == 1  # that of level two
