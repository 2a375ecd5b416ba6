"""`doublehead.accelerate` folds torchvision's backbone, RPN and box head; `fold=False` and `restore` take it back."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import RPNHead

import doublehead
from doublehead.interop.torchvision.folded import (
    FoldedBackboneWithFPN,
    FoldedFastRCNNPredictor,
    FoldedRPNHead,
    FoldedTwoMLPHead,
)
from doublehead.interop.torchvision.modules import AcceleratedRPN
from doublehead.models.folded import networks
from doublehead.ops import onednn
from tests.support.cudnn_standin import Launches, cuda_on_cpu
from tests.support.precision import assert_as_exact
from tests.support.torchvision_models import build, pictures


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build("fasterrcnn_resnet50_fpn").requires_grad_(False)


@pytest.fixture
def folds(monkeypatch) -> list[str]:
    """The networks that were run folded."""
    found = []
    for name in ("run_body", "run_proposal_head"):
        original = getattr(networks, name)
        monkeypatch.setattr(networks, name, lambda *a, name=name, original=original: found.append(name) or original(*a))
    linear = onednn.linear
    monkeypatch.setattr(onednn, "linear", lambda *a, **b: found.append("linear") or linear(*a, **b))
    monkeypatch.setattr(onednn, "LINEAR_ROWS", 8)
    return found


def kinds(model: nn.Module) -> list[type]:
    return [type(module) for module in folded_of(model)]


def folded_of(model: nn.Module) -> list[nn.Module]:
    return [model.backbone, model.rpn.head, model.roi_heads.box_head, model.roi_heads.box_predictor]


OURS = [FoldedBackboneWithFPN, FoldedRPNHead, FoldedTwoMLPHead, FoldedFastRCNNPredictor]
THEIRS = [BackboneWithFPN, RPNHead, TwoMLPHead, FastRCNNPredictor]


def test_they_are_folded_and_come_back(model, folds):
    model = copy.deepcopy(model)
    before = [type(module) for module in model.modules()]
    doublehead.accelerate(model)
    assert kinds(model) == OURS
    with torch.no_grad():
        model(pictures())
    assert folds == ["run_body", "run_proposal_head", "linear", "linear", "linear"]
    assert all(module in networks._FOLDED for module in folded_of(model))
    doublehead.restore(model)
    assert [type(module) for module in model.modules()] == before
    assert not any(module in networks._FOLDED for module in folded_of(model))


def test_without_folding(model, folds):
    model = copy.deepcopy(model)
    doublehead.accelerate(model, fold=False)
    assert kinds(model) == THEIRS
    with torch.no_grad():
        model(pictures())
    assert folds == []
    doublehead.accelerate(model)
    assert kinds(model) == OURS
    doublehead.accelerate(model, fold=False)  # takes it back
    assert kinds(model) == THEIRS and type(model.rpn) is AcceleratedRPN
    doublehead.restore(model)


def test_hooks_inside_are_called(model, folds):
    model, seen = doublehead.accelerate(copy.deepcopy(model)), []
    model.backbone.body.layer3.register_forward_hook(lambda *_: seen.append("layer3"))
    model.rpn.head.cls_logits.register_forward_hook(lambda *_: seen.append("logits"))
    with torch.no_grad():
        model(pictures())
    assert seen == ["layer3", *["logits"] * 5] and folds == ["linear"] * 3


def test_eval_makes_writes_through_data_seen(model):
    model, pixels = doublehead.accelerate(copy.deepcopy(model)), pictures()[0][None]
    with torch.no_grad():
        maps = model.backbone(pixels)
        before = model.rpn.head(list(maps.values()))[0][0]
        model.backbone.body.conv1.weight.data.mul_(2)
        model.rpn.head.cls_logits.weight.data.mul_(2)
        model.eval()
        assert not torch.allclose(model.backbone(pixels)["0"], maps["0"])
        assert not torch.allclose(model.rpn.head(list(maps.values()))[0][0], before)


def test_names_of_the_maps_stay(model):
    model, pixels = copy.deepcopy(model), pictures()[0][None]
    with torch.no_grad():
        expected = model.backbone(pixels)
        found = doublehead.accelerate(model).backbone(pixels)
    assert list(found) == list(expected) == ["0", "1", "2", "3", "pool"]
    for name, level in expected.items():
        assert found[name].is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found[name], level, rtol=0, atol=1e-4 * level.abs().max().item())


def test_eval_with_gradients_runs_the_modules(model, folds):
    model = doublehead.accelerate(copy.deepcopy(model)).requires_grad_(True)
    assert model.backbone(pictures()[0][None])["0"].requires_grad and folds == []


@torch.no_grad()
def test_on_cuda(model, folds):
    """In autocast's dtype, without a conversion of weights or maps at each call."""
    plain, model = copy.deepcopy(model), doublehead.accelerate(copy.deepcopy(model))
    pixels = pictures()[0][None, :, :32, :64]
    with cuda_on_cpu(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        maps, expected = model.backbone(pixels), plain.backbone(pixels)
        x = torch.randn(9, 256, 7, 7).bfloat16().to(memory_format=torch.channels_last)
        heads = model.roi_heads
        outputs, others = (m.box_predictor(m.box_head(x)) for m in (heads, plain.roi_heads))
        model.rpn.head(list(maps.values()))
        with Launches() as seen:
            model.rpn.head(list(model.backbone(pixels).values()))
            heads.box_predictor(heads.box_head(x))
    assert seen.counts["_to_copy"] == 0 and seen.counts["addmm"] == 1 + 4 + 5 + 2 + 1 and seen.total <= 95
    assert folds[:1] == ["run_body"] and "linear" not in folds
    exact = plain.backbone.double()(pixels.double())
    for name, level in expected.items():
        assert maps[name].dtype == torch.bfloat16 and maps[name].is_contiguous(memory_format=torch.channels_last)
        assert_as_exact(maps[name], level.bfloat16(), exact[name], roundings=8)
    for found, other in zip(outputs, others, strict=True):
        assert found.is_contiguous() and found.dtype == other.dtype
        torch.testing.assert_close(found, other, rtol=0, atol=0.05 * other.abs().max().item())
