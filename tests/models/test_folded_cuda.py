"""The networks as they run on CUDA, on a CPU with stand-ins for cuDNN's operators, and how much is launched."""

import copy

import pytest
import torch
from torch import nn

from doublehead.config import BackboneConfig, HeadConfig, ModelConfig, RPNConfig
from doublehead.models import ImageBatch, build_detector, folded, graph
from doublehead.models.folded import networks, on_cuda
from doublehead.models.heads import Head
from doublehead.models.rpn import RPN
from tests.support.cudnn_standin import LAST, Launches, cuda_on_cpu
from tests.support.folded import PIXELS, as_modules, build, folded_runs  # noqa: F401 (a fixture)
from tests.support.precision import assert_as_exact


@pytest.fixture(autouse=True)
def as_on_cuda():
    with cuda_on_cpu():
        yield


def autocast(dtype: torch.dtype | None):
    return torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False)


# ---------------------------------------------------------------------------------------------
# Results


SMALL, ODD = PIXELS[:1, :, :32, :64], PIXELS[:, :, :33, :47]
BODIES = {
    "basic blocks": ({}, torch.bfloat16, PIXELS),
    "levels that do not double": ({}, torch.float16, ODD),
    "bottlenecks": ({"name": "resnet50"}, None, SMALL),
    "stride in 1x1": ({"name": "resnet50", "stride_in_1x1": True}, torch.bfloat16, SMALL),
    "norms in the pyramid": ({"norm": "batch_norm", "fpn_norm": True}, torch.bfloat16, SMALL),
    "odd channels": ({"fpn_channels": 20}, torch.bfloat16, SMALL),
    "odd channels in float32": ({"fpn_channels": 18}, None, SMALL),
    "C4": ({"neck": "none"}, torch.float16, ODD),
}


@pytest.mark.parametrize("name", BODIES)
@torch.no_grad()
def test_backbones(runs, name):
    options, dtype, pixels = BODIES[name]
    body, before = build(**options), pixels.clone()
    with autocast(dtype):
        found, plain = body(pixels), as_modules(lambda: body(pixels))
    exact = as_modules(lambda: copy.deepcopy(body).double()(pixels.double()))
    for f, p, e in zip(found, plain, exact, strict=True):
        assert f.dtype == (dtype or torch.float32) and f.is_contiguous(memory_format=LAST)
        assert_as_exact(f, p.to(f.dtype), e, roundings=2 if dtype is None else 8)
    assert len(runs) == 1 and pixels.equal(before)


@pytest.mark.parametrize(
    "kernel, stride, padding, inputs, blocks",
    [(7, 2, 3, 3, True), (3, 2, 1, 3, True), (11, 2, 5, 5, True), (5, 2, 2, 3, False), (7, 2, 2, 3, False),
     (7, 1, 3, 3, False), (7, 2, 3, 16, False), (7, 2, 3, 4, True)],
)  # fmt: skip
@torch.no_grad()
def test_first_convolutions(monkeypatch, kernel, stride, padding, inputs, blocks):
    """As one over blocks of pixels, where the sides are even."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(inputs, 16, kernel, stride, padding), nn.ReLU()).eval().requires_grad_(False)
    seen, original = [], on_cuda.blocks_of
    monkeypatch.setattr(on_cuda, "blocks_of", lambda *arguments: seen.append(1) or original(*arguments))
    for height, width in ((12, 20), (13, 20), (12, 21)):
        seen.clear()
        x = torch.randn(2, inputs, height, width).bfloat16()
        for given in (x, x.to(memory_format=LAST)):
            with autocast(torch.bfloat16):
                found, plain = folded.sequence(layers, [layers], given), layers(given)
            exact = copy.deepcopy(layers).double()(x.double())
            assert_as_exact(found, plain, exact)
        assert bool(seen) is (blocks and height % 2 == width % 2 == 0)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@torch.no_grad()
def test_proposal_heads(runs, dtype):
    torch.manual_seed(0)
    rpn = RPN(RPNConfig(), 24).eval().requires_grad_(False)
    maps = [torch.randn(2, 24, 40 >> level, 48 >> level).to(memory_format=LAST) for level in range(5)]
    with autocast(dtype):
        found, plain = rpn._predict_all(maps), as_modules(lambda: rpn._predict_all(maps))
    exact = as_modules(lambda: copy.deepcopy(rpn).double()._predict_all([x.double() for x in maps]))
    for levels in zip(found, plain, exact, strict=True):
        for f, p, e in zip(*levels, strict=True):
            assert f.is_contiguous() and f.dtype == torch.float32
            assert_as_exact(f, p, e, eps=None if dtype is None else torch.finfo(dtype).eps)
    assert len(runs) == 1


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("layers", ["both", "classifier", "regressor"])
@torch.no_grad()
def test_predictors(dtype, layers):
    torch.manual_seed(0)
    head = Head.__new__(Head)
    nn.Module.__init__(head)
    head.classifier = nn.Linear(24, 5) if layers != "regressor" else None
    head.regressor = nn.Linear(24, 20) if layers != "classifier" else None
    head.num_classes, head.class_agnostic_boxes = 5, False
    head.tower = lambda x, count: x
    head.eval().requires_grad_(False)
    x = torch.randn(7, 24)
    with autocast(dtype):
        with Launches() as seen:
            found = head(x)
        head.train()
        plain = head(x)
        head.eval()
    assert seen.counts["addmm"] == 1 and dict(seen.calls)["addmm"][1].dtype == (dtype or torch.float32)
    for layer, f, p in zip((head.classifier, head.regressor), found, plain, strict=True):
        assert (f is None) is (layer is None) is (p is None)
        if layer is not None:
            exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
            f, p = f.flatten(1), p.flatten(1)
            assert f.dtype == torch.float32 and f.is_contiguous()
            assert_as_exact(f, p, exact, eps=None if dtype is None else torch.finfo(dtype).eps)


@torch.no_grad()
def test_what_is_not_finite_stays_so():
    """In the image where it is, and in no other."""
    body, pixels = build(), PIXELS[:, :, :32, :64].clone()
    expected = body(pixels)
    pixels[1, 2, 5, 7] = torch.nan
    for dtype in (torch.bfloat16, None):
        with autocast(dtype):
            found = body(pixels)
        assert all(y[1].isnan().all() and y[0].isfinite().all() for y in found)
    torch.testing.assert_close([y[0] for y in found], [y[0] for y in expected])
    c4 = build(neck="none")
    assert c4(pixels)[0][1].isnan().all() and c4(pixels)[0][0].isfinite().all()
    stage = c4.body.layer1
    assert folded.sequence(stage, [stage], torch.full((1, 64, 8, 8), torch.inf)).isnan().all()
    layers = nn.Sequential(nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 8, 1), nn.ReLU()).eval().requires_grad_(False)
    assert folded.sequence(layers, [layers], torch.full((1, 8, 3, 3), torch.nan)).isnan().all()
    body.body.layer2[0].conv1.weight[0, 0, 0, 0] = torch.nan
    assert all(y.isnan().any() for y in body(SMALL))


@torch.no_grad()
def test_maps_are_not_overwritten():
    """Neither those of the caller nor those that are given out."""
    body = build("resnet18", neck="none")
    x = torch.randn(1, 64, 9, 9).to(memory_format=LAST)
    before = x.clone()
    with Launches() as seen:
        assert folded.sequence(body, body.body.layer1, x) is not None
    assert torch.equal(x, before) and seen.counts["clone"] == 0


# ---------------------------------------------------------------------------------------------
# Aside


ASIDE = {
    "hook": lambda body: body.body.layer2[0].conv1.register_forward_hook(lambda *_: None),
    "gradient": lambda body: body.body.conv1.requires_grad_(True),
    "a part in training": lambda body: body.body.layer1.train(),
}


@pytest.mark.parametrize("reason", ASIDE)
def test_who_watches_is_served(runs, reason):
    body = build()
    ASIDE[reason](body)
    body(SMALL)
    assert runs == []


def test_what_makes_the_anchors_is_called_where_that_may_be_noticed():
    rpn, seen = RPN(RPNConfig(), 8).eval(), []
    maps = [torch.zeros(1, 8, 8 >> level, 8 >> level) for level in range(4)] + [torch.zeros(1, 8, 1, 1)]
    images = ImageBatch(torch.zeros(1, 3, 32, 32), torch.tensor([[32.0, 32.0]]))

    def anchors():
        logits, _ = zip(*rpn._predict_all(maps), strict=True)
        return rpn._anchors_and_levels(maps, logits, images.pixels.shape[-2:])

    with torch.no_grad():
        (first, levels), (again, _) = anchors(), anchors()
        assert all(a is b for a, b in zip(first, again, strict=True))
        assert levels.tolist() == [0] * 192 + [1] * 48 + [2] * 12 + [3] * 3 + [4] * 3
        torch.testing.assert_close(first, rpn.anchors(maps, (32, 32)), rtol=0, atol=0)
        rpn.anchors.cells.mul_(2)
        changed, _ = anchors()
        torch.testing.assert_close(changed, rpn.anchors(maps, (32, 32)), rtol=0, atol=0)
        maps = [x[..., :1] for x in maps]
        assert len(anchors()[0][0]) == 24
        handle = rpn.anchors.register_forward_hook(lambda *_: seen.append(1))
        anchors(), anchors()
        handle.remove()
        assert seen == [1, 1]
        rpn.train()
        assert rpn.anchors not in networks._FOLDED
        anchors()
        assert rpn.anchors not in networks._FOLDED


def test_anchors_of_somebody_else_are_made_at_each_call():
    class OfTheMaps(nn.Module):
        def forward(self, features, image_size):
            return [map.mean() + torch.zeros(3 * map.shape[2] * map.shape[3], 4) for map in features]

    rpn = RPN(RPNConfig(), 8).eval().requires_grad_(False)
    rpn.anchors = OfTheMaps().eval()
    for value in (1.0, 2.0):
        maps = [torch.full((1, 8, side, side), value) for side in (8, 4, 2, 1, 1)]
        logits, _ = zip(*rpn._predict_all(maps), strict=True)
        anchors, _ = rpn._anchors_and_levels(maps, logits, (32, 32))
        assert all(bool((of_level == value).all()) for of_level in anchors)


# ---------------------------------------------------------------------------------------------
# What is launched


LIMITS = {"double_head_ext": 175, "double_head": 200, "fc": 165}
"""Operators from the batch to the detections, ResNet-50 with a pyramid; it was 945, 962 and 935 (counted alike)."""


def detector(kind: str) -> nn.Module:
    torch.manual_seed(0)
    config = ModelConfig(
        BackboneConfig("resnet50", weights=None),
        RPNConfig(post_nms_test=20),
        head=HeadConfig(kind, fc_dim=64, conv_dim=64, conv_blocks=1),
    )
    return build_detector(config, num_classes=9).eval().detector.requires_grad_(False)


@pytest.mark.parametrize("kind", LIMITS)
@torch.no_grad()
def test_launches_of_a_detector(kind):
    model, images = detector(kind), ImageBatch(torch.randn(1, 3, 32, 64), torch.tensor([[32.0, 60.0]]))
    with autocast(torch.bfloat16):
        expected = model(images)
        with Launches() as seen:
            found = model(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert seen.total <= LIMITS[kind], seen.counts
    assert seen.counts["cudnn_convolution_relu"] == 1 + 2 * 16 + 5 and seen.counts["cudnn_convolution_add_relu"] == 16
    plain = [arguments[2] is None for name, arguments in seen.calls if name == "convolution"]
    assert (
        plain == [True] * 3 + [False] * 4
    )  # shortcuts with a stride, whose biases are elsewhere; the pyramid's outputs
    converted = [arguments[0] for name, arguments in seen.calls if name == "_to_copy"]
    assert all(x.shape[-1] in (3, 12) or x.dim() == 2 for x in converted)  # logits and deltas, no weights and no maps
    calls = dict(seen.calls)
    features = calls["pyramid_roi_align"][0]
    assert all(x.dtype == torch.bfloat16 and x.is_contiguous(memory_format=LAST) for x in features)
    if kind != "fc":
        assert calls["conv_head"][0].is_contiguous(memory_format=LAST) and calls["conv_head"][0].dtype == torch.bfloat16


@torch.no_grad()
def test_weights_are_prepared_once(monkeypatch):
    body, folds, original = build(), [], networks.fold
    monkeypatch.setattr(networks, "fold", lambda *source: folds.append(1) or original(*source))
    with autocast(torch.bfloat16):
        body(SMALL)
        once = len(folds)
        with Launches() as seen:
            body(SMALL)
        assert once > 20 and len(folds) == once and seen.counts["_to_copy"] == 0
    body(SMALL)
    assert len(folds) == 2 * once


@torch.no_grad()
def test_nothing_is_read_back_while_a_graph_is_recorded(monkeypatch):
    """Weights that nobody has folded before are folded in the graph."""
    body = build()
    monkeypatch.setattr(networks, "STREAMING_DEVICES", ("cpu",))
    for capturing in (True, False):
        networks.forget(body)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        with Launches() as seen:
            body(SMALL)
        assert seen.counts["_local_scalar_dense"] == (not capturing)
    with Launches() as seen:
        body(SMALL)
    assert seen.counts["_local_scalar_dense"] == 0


@torch.no_grad()
def test_a_graph_keeps_what_it_reads(monkeypatch):
    """The next call in another dtype replaces it."""
    monkeypatch.setattr(graph, "record", lambda run, device, pool=None: graph.Recording(run(), lambda: None))
    model = detector("fc")
    captured = graph.CapturedBucket(model, graph.Bucket(1, 32, 64, torch.bfloat16), torch.device("cpu"))
    held = {tensor.data_ptr() for tensor in captured._kept_alive}
    owners = [model.backbone, model.rpn, model.rpn.anchors, model.heads["fc"]]
    for owner in owners:
        tensors = networks._FOLDED[owner].tensors()
        assert tensors and all(tensor.data_ptr() in held for tensor in tensors)
    assert len(networks._FOLDED[model.backbone].tensors()) > 100
