"""`doublehead.accelerate`: the same results as torchvision's, in training too, and models come back as they were."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from torch import nn
from torchvision.models import detection
from torchvision.models.detection import _utils
from torchvision.models.detection.faster_rcnn import FasterRCNN, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

import doublehead
from doublehead.interop.torchvision.modules import (
    AcceleratedFrozenBatchNorm2d,
    AcceleratedMultiScaleRoIAlign,
    AcceleratedRoIHeads,
    AcceleratedRPN,
    AcceleratedTransform,
    ChannelsLastMultiScaleRoIAlign,
)
from tests.support.torchvision_models import PYRAMID, SMALL, build, pictures


def assert_same(found: list[dict], expected: list[dict], boxes: float, scores: float) -> None:
    for f, e in zip(found, expected, strict=True):
        assert f["labels"].tolist() == e["labels"].tolist()
        torch.testing.assert_close(f["boxes"], e["boxes"], atol=boxes, rtol=0)
        torch.testing.assert_close(f["scores"], e["scores"], atol=scores, rtol=0)
        assert set(f) == set(e)
        if "masks" in e:
            torch.testing.assert_close(f["masks"], e["masks"], atol=1e-3, rtol=0)
        if "keypoints" in e:
            torch.testing.assert_close(f["keypoints"], e["keypoints"], atol=1e-2, rtol=0)
            torch.testing.assert_close(f["keypoints_scores"], e["keypoints_scores"], atol=1e-3, rtol=1e-4)


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return build("fasterrcnn_mobilenet_v3_large_fpn")


# float64 first: in float32 rounding decides here and there whether an overlap passes the threshold of NMS.
@pytest.mark.parametrize("name", [*PYRAMID, "one_map"])
def test_every_builder(name):
    model = build(name).double()
    images = pictures(torch.float64)
    with torch.inference_mode():
        expected = model(images)
        assert doublehead.accelerate(model) is model
        found = model(images)
    assert sum(len(e["boxes"]) for e in expected) > 20
    assert_same(found, expected, boxes=1e-4, scores=1e-6)
    # In float32, beside torchvision's own code on the same convolutions, whose rounding depends on the memory format.
    images = pictures()
    with torch.inference_mode():
        found = model.float()(images)
        doublehead.restore(model).transform.__class__ = AcceleratedTransform
        expected = model(images)
    assert_same(found, expected, boxes=1e-2, scores=1e-4)
    doublehead.accelerate(model)

    pools = [model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool, model.roi_heads.keypoint_roi_pool]
    own = [AcceleratedMultiScaleRoIAlign] if name.startswith(("mask", "keypoint")) else []
    assert [type(pool) for pool in pools if pool is not None] == [ChannelsLastMultiScaleRoIAlign, *own]
    assert type(model.rpn) is AcceleratedRPN and type(model.roi_heads) is AcceleratedRoIHeads
    assert type(model.transform) is AcceleratedTransform


def test_in_float32(small):
    model, images = copy.deepcopy(small), pictures()
    with torch.inference_mode():
        expected = model(images)
        found = doublehead.accelerate(model)(images)
    assert_same(found, expected, boxes=1e-2, scores=1e-4)


def targets_of(images: list[torch.Tensor]) -> list[dict]:
    box = torch.tensor([[5.0, 8, 40, 45], [20, 10, 60, 40]], dtype=images[0].dtype)
    return [{"boxes": box[: 1 + row % 2], "labels": torch.tensor([3, 5])[: 1 + row % 2]} for row in range(len(images))]


def losses_and_gradients(model: nn.Module, images: list[torch.Tensor]) -> tuple[dict, dict]:
    torch.manual_seed(3)  # of the samplers
    losses = model(images, targets_of(images))
    sum(losses.values()).backward()
    return losses, {name: parameter.grad for name, parameter in model.named_parameters()}


def test_training(small):
    images = pictures(torch.float64)
    theirs, ours = (copy.deepcopy(small).double().train() for _ in range(2))
    for model in (theirs, ours):
        model.roi_heads.fg_bg_sampler.batch_size_per_image = 48
    expected, expected_grads = losses_and_gradients(theirs, images)
    found, grads = losses_and_gradients(doublehead.accelerate(ours), images)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-6, atol=1e-9)
    assert all(grad.abs().sum() > 0 for name, grad in grads.items() if "fpn" in name)


def test_it_comes_back_as_it_was(small):
    model = copy.deepcopy(small)
    kinds = [type(module) for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    doublehead.accelerate(model)
    assert [type(module) for module in model.modules()] != kinds
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    doublehead.accelerate(model)  # again: nothing happens
    assert doublehead.restore(model) is model
    assert [type(module) for module in model.modules()] == kinds
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    doublehead.restore(model)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("name", ["maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"])
def test_other_heads_train(name):
    model, images = doublehead.accelerate(build(name)).train(), pictures()
    model.roi_heads.fg_bg_sampler.batch_size_per_image = 16
    targets = targets_of(images)
    for image, target in zip(images, targets, strict=True):
        number = len(target["boxes"])
        target["masks"] = torch.ones(number, *image.shape[1:], dtype=torch.uint8)
        target["keypoints"] = torch.tensor([[[10.0, 12, 1], [20, 25, 1], [30, 40, 1]]] * number)
    losses = model(images, targets)
    sum(losses.values()).backward()
    extra = model.roi_heads.mask_head if name.startswith("mask") else model.roi_heads.keypoint_head
    assert all(loss.isfinite() for loss in losses.values()) and len(losses) == 5
    assert all(parameter.grad is not None for parameter in extra.parameters())


def test_copies_and_pickles_stay_accelerated(small):
    model, images = doublehead.accelerate(copy.deepcopy(small)), pictures()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert type(other.rpn) is AcceleratedRPN
        assert isinstance(other.roi_heads.box_roi_pool, AcceleratedMultiScaleRoIAlign)
        with torch.inference_mode():
            assert_same(other(images), model(images), boxes=0, scores=0)
    doublehead.restore(small).load_state_dict(model.state_dict())


def test_a_part_exchanged_later_is_accelerated_too(small):
    model = doublehead.accelerate(copy.deepcopy(small))
    model.roi_heads.box_roi_pool = MultiScaleRoIAlign(["0", "1"], 7, 2)
    doublehead.accelerate(model)
    assert isinstance(model.roi_heads.box_roi_pool, AcceleratedMultiScaleRoIAlign)


def test_detections_keep_their_gradient_where_gradients_are_on(small):
    model, images = doublehead.accelerate(copy.deepcopy(small)), pictures()
    image = images[0].requires_grad_()
    model([image])[0]["scores"].sum().backward()
    assert image.grad.abs().sum() > 0


def test_frozen_batch_norm():
    torch.manual_seed(0)
    norm = FrozenBatchNorm2d(6)
    for buffer in norm.buffers():
        buffer.uniform_(0.5, 2)
    x = torch.randn(2, 6, 5, 7, requires_grad=True)
    expected = norm(x)
    norm.__class__ = AcceleratedFrozenBatchNorm2d
    found = norm(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)))
    assert norm(x.bfloat16()).dtype == torch.float32  # as torchvision's


# ---------------------------------------------------------------------------------------------
# Parts


@pytest.mark.parametrize("score_thresh", [0.0, 0.4])
@pytest.mark.parametrize("training", [False, True])
def test_filter_proposals(small, score_thresh, training):
    """More and fewer anchors than pre_nms_top_n, boxes outside, without area, with NaN; sizes that differ."""
    theirs = copy.deepcopy(small.rpn).train(training)
    theirs.score_thresh = score_thresh
    theirs._pre_nms_top_n = {"training": 70, "testing": 50}
    theirs._post_nms_top_n = {"training": 60, "testing": 40}
    ours = copy.deepcopy(theirs)
    ours.__class__ = AcceleratedRPN
    torch.manual_seed(0)
    corners = torch.rand(2, 150, 2) * 120 - 10
    boxes = torch.cat((corners, corners + torch.rand(2, 150, 2) * 60), 2)
    boxes[0, 3, 2:] = boxes[0, 3, :2]
    boxes[1, 5] = torch.nan
    logits = torch.randn(300, 1)
    arguments = (boxes, logits, [(90, 100), (64, 120)], [110, 40])
    for of_ours, of_theirs in zip(ours.filter_proposals(*arguments), theirs.filter_proposals(*arguments), strict=True):
        assert 10 < len(of_theirs[0]) <= 60
        torch.testing.assert_close(of_ours, of_theirs, rtol=0, atol=1e-6)


def pools(**options) -> tuple[MultiScaleRoIAlign, MultiScaleRoIAlign]:
    settings = {"featmap_names": ["0", "1", "2"], "output_size": (3, 5), "sampling_ratio": 2, **options}
    theirs, ours = MultiScaleRoIAlign(**settings), MultiScaleRoIAlign(**settings)
    ours.__class__ = AcceleratedMultiScaleRoIAlign
    return theirs, ours


@pytest.mark.parametrize("options", [{}, {"sampling_ratio": 0}, {"canonical_scale": 10, "canonical_level": 3}])
@pytest.mark.parametrize("strides", [(4, 8, 16), (4, 16, 32), (8,)])  # with (4, 16, 32) torchvision has a gap
def test_pooling(options, strides):
    torch.manual_seed(0)
    features = {str(i): torch.randn(2, 4, 128 // s, 160 // s, requires_grad=True) for i, s in enumerate(strides)}
    features["pool"] = torch.randn(2, 4, 2, 2)
    corners = torch.rand(40, 2) * 60
    boxes = torch.cat((corners, corners + torch.rand(40, 2) * 90), 1)
    theirs, ours = pools(**options)
    for sizes in ([(128, 160), (100, 90)], [(64, 80), (64, 80)]):  # torchvision goes by the first call's scales
        arguments = (features, [boxes[:15], boxes[15:]], sizes)
        found, expected = ours(*arguments), theirs(*arguments)
        torch.testing.assert_close(found, expected)
        assert found.is_contiguous() and ours.scales == theirs.scales
        assert vars(ours.map_levels) == vars(theirs.map_levels)
    maps = list(features.values())[:-1]
    grads = (torch.autograd.grad(y.square().sum(), maps, allow_unused=True) for y in (found, expected))
    for of_ours, of_theirs in zip(*grads, strict=True):
        assert (of_ours is None) == (of_theirs is None)
        if of_ours is not None:
            torch.testing.assert_close(of_ours, of_theirs, rtol=1e-4, atol=1e-4)


def test_no_proposal_at_all(small):
    model, images = copy.deepcopy(small), pictures()
    model.rpn.score_thresh = 1.1
    with torch.inference_mode():
        expected = model(images)
        found = doublehead.accelerate(model)(images)
    assert [len(f["boxes"]) for f in found] == [0, 0]
    assert_same(found, expected, boxes=0, scores=0)


# ---------------------------------------------------------------------------------------------
# What is refused


class OtherRPN(detection.rpn.RegionProposalNetwork):
    def filter_proposals(self, *arguments):
        return super().filter_proposals(*arguments)


class OtherHeads(RoIHeads):
    pass


class OtherCoder(_utils.BoxCoder):
    pass


class OtherPool(MultiScaleRoIAlign):
    pass


def change_class(path: str, kind: type):
    def change(model):
        for name in path.split("."):
            model = getattr(model, name)
        model.__class__ = kind

    return change


REFUSED = {
    "model.rpn must be .* got .*OtherRPN": change_class("rpn", OtherRPN),
    "model.roi_heads must be .* got .*OtherHeads": change_class("roi_heads", OtherHeads),
    "model.rpn.box_coder": change_class("rpn.box_coder", OtherCoder),
    "model.roi_heads.box_coder must": change_class("roi_heads.box_coder", OtherCoder),
    "model.roi_heads.box_roi_pool must be .* got .*OtherPool": change_class("roi_heads.box_roi_pool", OtherPool),
    "model.roi_heads.mask_roi_pool must": lambda model: setattr(model.roi_heads, "mask_roi_pool", nn.Identity()),
    "model.rpn.filter_proposals was replaced": lambda model: setattr(model.rpn, "filter_proposals", print),
    "bbox_xform_clip must be": lambda model: setattr(model.roi_heads.box_coder, "bbox_xform_clip", 3.0),
    "map_levels must be": lambda model: setattr(model.roi_heads.box_roi_pool, "map_levels", print),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_it_does_not_know_is_refused_and_left_alone(small, message):
    model = copy.deepcopy(small)
    REFUSED[message](model)
    kinds = [type(module) for module in model.modules()]
    with pytest.raises((TypeError, ValueError), match=message):
        doublehead.accelerate(model)
    assert [type(module) for module in model.modules()] == kinds


def test_other_models_are_refused_by_name(small):
    retina = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
    for model, message in (
        (retina, "got SSD: .*one-stage"),
        (nn.DataParallel(small), "got DataParallel: give model.module"),
        (torch.jit.script(nn.Linear(1, 1)), "TorchScript"),
    ):
        for call in (doublehead.accelerate, doublehead.restore):
            with pytest.raises(TypeError, match=message):
                call(model)


class View(nn.Module):
    """A layer that bears no channels-last memory."""

    def forward(self, x):
        return x.view(len(x), -1).view(x.shape)


def test_layers_of_others_see_the_memory_format_they_know():
    backbone = nn.Sequential(nn.Conv2d(3, 8, 8, 8), View())
    backbone.out_channels = 8
    pool, generator = MultiScaleRoIAlign(["0"], 2, 2), AnchorGenerator(((16, 32),), ((1.0,),))
    head = nn.Sequential(View(), TwoMLPHead(32, 1024))
    model = FasterRCNN(
        backbone, 3, rpn_anchor_generator=generator, box_roi_pool=pool, box_head=head, **SMALL
    ).eval().to(memory_format=torch.channels_last)  # fmt: skip
    model.backbone.to(memory_format=torch.contiguous_format)
    doublehead.accelerate(model)
    assert type(pool) is AcceleratedMultiScaleRoIAlign
    assert type(model.rpn) is AcceleratedRPN and type(model.transform) is not AcceleratedTransform
    with torch.inference_mode():
        model(pictures())


def test_the_package_needs_no_torchvision():
    code = "import doublehead, doublehead.ops, sys; assert 'torchvision' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
