"""The folded networks give what their modules give in float64."""

import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import conv2d
from torchvision.models.detection.rpn import RPNHead

from doublehead.config import RPNConfig
from doublehead.models import folded
from doublehead.models.folded import networks
from doublehead.models.rpn import RPN
from doublehead.models.towers import Conv5Tower
from doublehead.ops import onednn, winograd
from doublehead.ops.winograd import choice
from tests.support.folded import PIXELS, as_modules, build, folded_runs, lively, of_head  # noqa: F401 (a fixture)
from tests.support.precision import assert_as_exact


def assert_exact(found: list[Tensor], plain: list[Tensor], exact: list[Tensor], **bounds) -> None:
    for f, p, e in zip(found, plain, exact, strict=True):
        assert f.is_contiguous(memory_format=torch.channels_last)
        assert_as_exact(f, p.to(f.dtype), e, **bounds)


BODIES = {
    "basic blocks": {},
    "bottlenecks": {"name": "resnet50"},
    "batch norm, also in the pyramid": {"norm": "batch_norm", "fpn_norm": True},
    "stride in 1x1": {"name": "resnet50", "stride_in_1x1": True},
    "C4": {"name": "resnet50", "neck": "none"},
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("pixels", [PIXELS, PIXELS[:1, :, :33, :47]], ids=["two", "odd"])
def test_backbones(runs, name, pixels):
    body = build(**BODIES[name])
    twice = copy.deepcopy(body).double()
    with torch.no_grad():
        found, plain = body(pixels), as_modules(lambda: body(pixels))
        wide = twice(pixels.double())
        exact = as_modules(lambda: twice(pixels.double()))
    assert runs == [torch.float32, torch.float64]
    assert_exact(found, plain, exact)
    for w, e in zip(wide, exact, strict=True):
        torch.testing.assert_close(w, e, rtol=1e-11, atol=1e-11 * e.abs().max().item())


@pytest.mark.parametrize("depth", [1, 2])
def test_rpn_heads(runs, depth):
    torch.manual_seed(0)
    ours = RPN(RPNConfig(), 24).eval().requires_grad_(False)
    head = RPNHead(24, 3, depth).eval().requires_grad_(False)
    maps = [torch.randn(2, 24, 40 >> level, 48 >> level) for level in range(5)]
    for network, call in (
        (ours, lambda network, maps: [part for level in network._predict_all(maps) for part in level]),
        (head, lambda network, maps: [part for parts in of_head(network, maps) for part in parts]),
    ):
        twice = copy.deepcopy(network).double()
        with torch.no_grad():
            found, plain = call(network, maps), as_modules(lambda: call(network, maps))  # noqa: B023
            exact = as_modules(lambda: call(twice, [x.double() for x in maps]))  # noqa: B023
        for f, p, e in zip(found, plain, exact, strict=True):
            assert_as_exact(f, p, e)
    assert len(runs) == 2


@pytest.mark.parametrize("changed", [None, "kernel", "bias", "stride"])
@torch.no_grad()
def test_both_outputs_of_rpn_heads_are_one_convolution(monkeypatch, runs, changed):
    """Where they differ in no more than their channels; what is given out lies as before, in memory of its own."""
    outputs, original = [], networks.fold
    monkeypatch.setattr(
        networks, "fold", lambda layer, *source: outputs.append(layer.outputs) or original(layer, *source)
    )
    torch.manual_seed(0)
    head, maps = RPNHead(24, 3).eval().requires_grad_(False), [torch.randn(2, 24, 20, 28), torch.randn(2, 24, 10, 14)]
    if changed is not None:
        options = {"kernel": {"kernel_size": 3, "padding": 1}, "bias": {"bias": False}, "stride": {"stride": (1, 2)}}
        head.bbox_pred = nn.Conv2d(24, 12, **{"kernel_size": 1, **options[changed]}).eval().requires_grad_(False)
    found = of_head(head, maps)
    plain, exact = head(maps), copy.deepcopy(head).double()([x.double() for x in maps])
    assert outputs == ([24, 15] if changed is None else [24, 3, 12]) and len(runs) == 1
    for parts in zip(found, plain, exact, strict=True):
        assert_exact(*parts)
    storages = {y.untyped_storage().data_ptr() for part in found for y in part}
    assert len(storages) == 4 and all(y.untyped_storage().nbytes() == 4 * y.numel() for part in found for y in part)
    before = found[0][0]
    head.cls_logits.bias.add_(1)
    torch.testing.assert_close(of_head(head, maps)[0][0], before + 1)


def test_c4s_tower(runs):
    torch.manual_seed(0)
    tower = lively(Conv5Tower(torchvision.models.resnet50(weights=None).layer4))
    x = torch.randn(3, 1024, 8, 8)
    with torch.no_grad():
        found, plain = tower(x), as_modules(lambda: tower(x))
        exact = as_modules(lambda: copy.deepcopy(tower).double()(x.double()))
        assert tower(x[:0]).shape == (0, 2048)
    assert_as_exact(found, plain, exact)
    assert len(runs) == 1


# ---------------------------------------------------------------------------------------------
# By Winograd's method


@pytest.fixture
def transformed(monkeypatch) -> list[bool]:
    """Of each convolution that runs by Winograd's method, whether it adds to a residual."""
    found = []
    original = winograd.convolution

    def convolution(x, packed, bias, outputs, residual=None, relu=False):
        found.append(residual is not None)
        return original(x, packed, bias, outputs, residual, relu)

    monkeypatch.setattr(winograd, "convolution", convolution)
    monkeypatch.setattr(choice, "_is_fast_here", lambda: True)
    return found


@pytest.mark.skipif(not onednn.is_available(), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("pixels", [PIXELS, PIXELS[:, :, :59, :89]], ids=["whole tiles", "parts of tiles"])
def test_winograds_method(monkeypatch, transformed, pixels):
    body = build()
    with torch.no_grad():
        found, plain = body(pixels), as_modules(lambda: body(pixels))
        exact = as_modules(lambda: copy.deepcopy(body).double()(pixels.double()))
        assert transformed == [False, True] * 2  # the first stage alone has enough cells
        assert_exact(found, plain, exact)
        body.body.layer1[0].conv1.weight.mul_(1.5)
        assert not body(pixels)[0].equal(found[0]) and len(transformed) == 8  # transformed again
        monkeypatch.setattr(choice, "_is_fast_here", lambda: False)
        body(pixels)
        monkeypatch.setattr(choice, "_is_fast_here", lambda: True)
        body.body.layer1[0].conv1.weight[0, 0, 0, 0] = torch.nan
        assert body(pixels)[0].isnan().any() and len(transformed) == 8


@pytest.mark.skipif(not onednn.is_available(), reason="this PyTorch has no oneDNN")
def test_layers_that_are_not_transformed(transformed):
    """Other kernels, strides, paddings, dilations and groups; few channels or cells."""
    layers = [
        nn.Conv2d(64, 64, 1), nn.Conv2d(64, 64, 3, 2, 1), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3, 1, 2),
        nn.Conv2d(64, 64, 3, 1, 2, 2), nn.Conv2d(64, 64, 3, 1, 1, groups=2), nn.Conv2d(64, 64, (3, 1), 1, (1, 0)),
        nn.Conv2d(64, 32, 3, 1, 1), nn.Conv2d(32, 64, 3, 1, 1), nn.Conv2d(64, 64, 3, 1, 1),
    ]  # fmt: skip
    sides = [24] * (len(layers) - 1) + [20, 24]
    with torch.no_grad():
        for module, side in zip([*layers, layers[-1]], sides, strict=True):
            assert not transformed
            module.eval().requires_grad_(False)
            assert folded.sequence(module, [module], torch.rand(1, module.in_channels, side, side)) is not None
    assert transformed == [False]  # the last one, for comparison


# ---------------------------------------------------------------------------------------------
# Without oneDNN, and in 16 bits


@pytest.mark.parametrize("name", ["basic blocks", "bottlenecks"])
def test_without_onednn(monkeypatch, runs, name):
    monkeypatch.setattr(onednn, "is_available", lambda dtype: False)
    body = build(**BODIES[name])
    with torch.no_grad():
        found, plain = body(PIXELS), as_modules(lambda: body(PIXELS))
        exact = as_modules(lambda: copy.deepcopy(body).double()(PIXELS.double()))
    assert_exact(found, plain, exact)
    assert len(runs) == 1


@pytest.fixture
def seen(monkeypatch) -> list[Tensor]:
    """What oneDNN's functions are given, which plain ones stand for."""
    given = []

    def convolution(x, packed, bias, stride, padding, relu):
        given.extend((x, packed, bias))
        assert not torch.is_autocast_enabled("cpu") and x.is_contiguous(memory_format=torch.channels_last)
        y = conv2d(x, packed, bias, stride, padding)
        return y.relu() if relu else y

    def add_convolution(to, x, packed, bias, stride, padding, relu):
        given.append(to)
        return to.copy_((to + convolution(x, packed, bias, stride, padding, False)).relu_() if relu else
                        to + convolution(x, packed, bias, stride, padding, False))  # fmt: skip

    monkeypatch.setattr(onednn, "is_available", lambda dtype: dtype in (torch.float32, torch.bfloat16))
    monkeypatch.setattr(onednn, "pack", lambda weight, *_: weight)
    monkeypatch.setattr(onednn, "convolution", convolution)
    monkeypatch.setattr(onednn, "add_convolution", add_convolution)
    return given


def test_autocast_runs_in_16_bits_throughout(seen):
    body, rpn = build(), RPN(RPNConfig(), 16).eval().requires_grad_(False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = body(PIXELS)
        outputs = rpn._predict_all(found)
        plain = as_modules(lambda: body(PIXELS))
    exact = as_modules(lambda: copy.deepcopy(body).double()(PIXELS.double()))
    assert len(seen) > 60 and {tensor.dtype for tensor in seen} == {torch.bfloat16}
    assert_exact(found, plain, exact, roundings=8)
    assert all(tensor.dtype == torch.float32 for level in outputs for tensor in level)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_where_the_processor_has_no_kernel(monkeypatch, runs, autocast):
    monkeypatch.setattr(onednn, "is_available", lambda dtype: dtype == torch.float32)
    body = build()
    with torch.no_grad(), torch.autocast("cpu", autocast):
        assert {y.dtype for y in body(PIXELS[:1, :, :32, :32])} == {autocast}
    assert runs == [autocast]
