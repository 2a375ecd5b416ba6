"""Which anchors the RPN learns from: those that cross an image's border are left out where `rpn.straddle` says so."""

import pytest
import torch

from doublehead.config import ModelConfig, RPNConfig, from_dict, to_dict
from doublehead.models.anchors import inside_images
from doublehead.models.rpn import RPN
from doublehead.models.structures import ImageBatch, Targets
from tests.restatements.maskrcnn_benchmark import STRIDES, cell_anchors, grid_anchors, rpn_labels, rpn_losses

SIZES = ((75, 96), (64, 83))  # (height, width) of two images in a batch of 96 x 96 pixels
CELLS = [-(-96 // stride) for stride in STRIDES]
EVERYTHING = 2**20  # more samples than anchors
# Last pixels; the second image's first box leaves its border, so that its best anchors do too.
TRUTHS = ([[10, 12, 41, 43], [40, 3, 90, 60]], [[0, 0, 30, 20], [30, 20, 61, 51]])


def rpn(**changes) -> RPN:
    """Lively, in float64, with anchors that end at half a pixel too (the sides of 20 and 22 on a stride of 4 and 8)."""
    torch.manual_seed(0)
    config = RPNConfig((20, 22, 40, 64, 128), anchors="legacy", samples=EVERYTHING, positive_fraction=1.0, **changes)
    made = RPN(config, 4).double()
    for layer in (made.conv, made.objectness, made.deltas):
        torch.nn.init.normal_(layer.weight, std=0.3)
    return made.train()


def inputs() -> tuple[ImageBatch, list[torch.Tensor], Targets]:
    generator = torch.Generator().manual_seed(1)
    maps = [torch.randn(2, 4, cells, cells, generator=generator, dtype=torch.double) for cells in CELLS]
    boxes = torch.tensor(TRUTHS, dtype=torch.double) + torch.tensor([0, 0, 1, 1])
    images = ImageBatch(torch.zeros(2, 3, 96, 96), torch.tensor(SIZES, dtype=torch.float32))
    return images, maps, Targets(boxes, torch.ones(2, 2, dtype=torch.int64))


def restated_anchors(config: RPNConfig) -> torch.Tensor:
    levels = zip(config.anchor_sizes, STRIDES, CELLS, strict=True)
    return torch.cat([grid_anchors(cell_anchors(size, stride), stride, (n, n)) for size, stride, n in levels])


@pytest.mark.parametrize("straddle", [-1.0, 0.0, 0.5, 16.0])
def test_labels_and_losses_are_the_releases(straddle):
    model, (images, maps, targets) = rpn(straddle=straddle), inputs()
    anchors, truths = restated_anchors(model.config), torch.tensor(TRUTHS, dtype=torch.double)
    ours = torch.cat(model.anchors(maps, (96, 96)))
    torch.testing.assert_close(ours - torch.tensor([0, 0, 1, 1]), anchors)
    _, state = model.assign(ours, images.sizes, targets)
    cases = zip(truths, SIZES, strict=True)
    labels = torch.stack([rpn_labels(anchors, truth, size, straddle)[0] for truth, size in cases])
    assert torch.equal(state, labels.long())
    assert (labels == 1).any(1).all() and (labels == 0).any(1).all()

    _, losses = model(images, maps, targets)
    logits, deltas = (torch.cat(parts, 1) for parts in zip(*map(model.predict, maps), strict=True))
    objectness, box = rpn_losses(logits, deltas, anchors, truths, SIZES, straddle)
    torch.testing.assert_close(losses["loss_rpn_objectness"], objectness)
    torch.testing.assert_close(losses["loss_rpn_box"], box)


def test_the_cases_tell_the_rules_apart():
    """Anchors end at half a pixel, best anchors lie outside, and each threshold leaves out others."""
    anchors = restated_anchors(rpn().config)
    truths = torch.tensor(TRUTHS, dtype=torch.double)
    kept = [rpn_labels(anchors, truths[1], SIZES[1], straddle)[0] for straddle in (-1, 0, 0.5, 16)]
    assert (kept[0] == 1).sum() > (kept[1] == 1).sum()  # the first box's best ones
    assert len({int((labels == 0).sum()) for labels in kept}) == 4
    assert ((anchors[:, 2] > SIZES[1][1] - 1) & (anchors[:, 2] < SIZES[1][1])).any()


@pytest.mark.parametrize("anchors", ["rounded", "exact"])
def test_a_box_that_ends_at_the_border_does_not_cross_it(anchors):
    boxes = torch.tensor([[0.0, 0, 10, 20], [0, 0, 10.25, 20], [0, 0, 10, 20.25], [-0.25, 0, 9, 9], [0, -0.25, 9, 9]])
    sizes = torch.tensor([[20.0, 10], [21, 10], [20, 11]])
    expected = [[True, False, False, False, False], [True, False, True, False, False], [True, True] + [False] * 3]
    assert inside_images(boxes, sizes, 0.0).tolist() == expected
    assert inside_images(boxes, sizes, 0.25).all()
    model = RPN(RPNConfig(anchors=anchors, straddle=0.0), 1)
    _, state = model.assign(boxes, sizes, Targets(torch.zeros(3, 1, 4), torch.zeros(3, 1, dtype=torch.int64)))
    assert (state >= 0).tolist() == expected


def test_an_image_smaller_than_its_anchors_has_no_loss_and_no_gradient():
    config = RPNConfig((64, 128, 256, 512, 1024), straddle=0.0)
    model, (_, maps, targets) = RPN(config, 4).double().train(), inputs()
    images = ImageBatch(torch.zeros(2, 3, 96, 96), torch.full((2, 2), 40.0))
    _, losses = model(images, maps, targets)
    sum(losses.values()).backward()
    assert [loss.item() for loss in losses.values()] == [0, 0]
    assert not any(parameter.grad.any() for parameter in model.parameters())


def test_proposals_do_not_depend_on_it():
    images, maps, _ = inputs()
    for mode in (True, False):
        found = [rpn(straddle=straddle).train(mode)(images, maps)[0].boxes for straddle in (-1.0, 0.0)]
        assert torch.equal(*found)


def test_models_from_before_train_on_all_anchors():
    values = to_dict(ModelConfig(rpn=RPNConfig(straddle=0.0)))
    del values["rpn"]["straddle"]
    assert from_dict(values, ModelConfig).rpn.straddle == -1.0 == RPNConfig().straddle
