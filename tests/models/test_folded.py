"""The folded networks: as the modules in float64, remembered as long as the weights, aside where they may not run."""

import copy
import io
from contextlib import nullcontext

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.functional import conv2d
from torch.nn.utils import prune
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection.rpn import RPNHead

from doublehead.config import BackboneConfig, RPNConfig
from doublehead.models import folded
from doublehead.models.backbone import ResNetFPN, build_backbone
from doublehead.models.folded import networks
from doublehead.models.folded.plan import Reader
from doublehead.models.rpn import RPN
from doublehead.models.towers import Conv5Tower
from doublehead.ops import onednn, winograd
from doublehead.ops.winograd import choice
from tests.support.precision import assert_as_exact

PIXELS = torch.linspace(-2, 2, 2 * 3 * 64 * 96).sin().reshape(2, 3, 64, 96)


def lively(module: nn.Module) -> nn.Module:
    """Statistics and weights of batch norms that are not 0 and 1."""
    random = torch.Generator().manual_seed(0)
    for layer in module.modules():
        for name in ("running_mean", "running_var", "weight", "bias"):
            tensor = getattr(layer, name, None)
            if hasattr(layer, "running_mean") and tensor is not None:
                tensor.data.uniform_(0.3, 1.2, generator=random).sub_(0.5 if name in ("running_mean", "bias") else 0)
    return module.eval().requires_grad_(False)


def build(name: str = "resnet18", **options) -> nn.Module:
    torch.manual_seed(0)
    options = {"weights": None, "fpn_channels": 16, **options}
    return lively(build_backbone(BackboneConfig(name=name, **options)).body)


@pytest.fixture
def runs(monkeypatch) -> list[torch.dtype]:
    """The dtype of each map that folded networks were run on."""
    found = []

    def watch(original):
        def run(plan, weights, maps, *options, **more):
            found.append((maps if isinstance(maps, Tensor) else maps[0]).dtype)
            return original(plan, weights, maps, *options, **more)

        return run

    for name in ("run_body", "run_steps", "run_proposal_head"):
        monkeypatch.setattr(networks, name, watch(getattr(networks, name)))
    return found


def as_modules(call):
    """The result of the modules themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "may_fold", lambda *_: False)
        return call()


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
        (head, lambda network, maps: [part for parts in _of_head(network, maps) for part in parts]),
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
    found = _of_head(head, maps)
    plain, exact = head(maps), copy.deepcopy(head).double()([x.double() for x in maps])
    assert outputs == ([24, 15] if changed is None else [24, 3, 12]) and len(runs) == 1
    for parts in zip(found, plain, exact, strict=True):
        assert_exact(*parts)
    storages = {y.untyped_storage().data_ptr() for part in found for y in part}
    assert len(storages) == 4 and all(y.untyped_storage().nbytes() == 4 * y.numel() for part in found for y in part)
    before = found[0][0]
    head.cls_logits.bias.add_(1)
    torch.testing.assert_close(_of_head(head, maps)[0][0], before + 1)


def _of_head(head: RPNHead, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    found = folded.rpn_head(head, [head.conv], head.cls_logits, head.bbox_pred, maps)
    return head(maps) if found is None else found


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


def test_layers_that_are_not_transformed(transformed):
    """Other kernels, strides, paddings, dilations and groups; few channels or cells."""
    layers = [
        nn.Conv2d(64, 64, 1), nn.Conv2d(64, 64, 3, 2, 1), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3, 1, 2),
        nn.Conv2d(64, 64, 3, 1, 2, 2), nn.Conv2d(64, 64, 3, 1, 1, groups=2), nn.Conv2d(64, 64, (3, 1), 1, (1, 0)),
        nn.Conv2d(64, 32, 3, 1, 1), nn.Conv2d(32, 64, 3, 1, 1), nn.Conv2d(64, 64, 3, 1, 1),
    ]  # fmt: skip
    with torch.no_grad():
        for module in nn.ModuleList(layers).eval().requires_grad_(False):
            inputs = getattr(module, "in_channels", 64)
            assert folded.sequence(module, [module], torch.rand(1, inputs, 20, 20)) is not None
    assert len(transformed) == 0


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


# ---------------------------------------------------------------------------------------------
# Remembered


CHANGES = {
    "copied into": lambda body: body.body.conv1.weight.copy_(torch.ones_like(body.body.conv1.weight)),
    "a statistic": lambda body: body.body.bn1.running_var.add_(1),
    "another tensor": lambda body: setattr(body.body.bn1, "bias", torch.ones(64)),
    "another epsilon": lambda body: setattr(body.body.layer1[0].bn1, "eps", 0.5),
    "another stride": lambda body: setattr(body.body.layer1[0].conv1, "padding", (0, 0)) or
                                   setattr(body.body.layer1[0].conv2, "padding", (2, 2)),
    "statistics of a norm in training": lambda body: body.body.bn1.train()(torch.randn(2, 64, 4, 4)) is
                                                     body.body.bn1.eval(),
    "the same memory in another order": lambda body: setattr(body.body.conv1.weight, "data",
                                                            body.body.conv1.weight.data.transpose(2, 3)),
    "another layer": lambda body: setattr(body.body, "maxpool", nn.MaxPool2d(2, 2).eval()),
    "loaded": lambda body: body.load_state_dict(build(norm_eps=0.1).state_dict()),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_changes_are_seen(runs, change):
    body = build(norm="batch_norm" if "training" in change else "frozen_batch_norm")
    before = body(PIXELS)[0]
    if change == "loaded":
        torch.manual_seed(1)
    CHANGES[change](body)
    found = body(PIXELS)[0]
    expected = as_modules(lambda: body(PIXELS))[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    assert len(runs) == 2
    if change != "loaded":
        assert not torch.allclose(found, before)


@torch.no_grad()
def test_weights_are_folded_once_and_the_users_stay(monkeypatch):
    folds = []
    original = networks.fold
    monkeypatch.setattr(networks, "fold", lambda *source: folds.append(1) or original(*source))
    body = build()
    state = {name: tensor.clone() for name, tensor in body.state_dict().items()}
    versions = [tensor._version for tensor in body.state_dict().values()]
    pixels, attributes = PIXELS.clone(), set(vars(body))
    first = body(pixels)
    once = len(folds)
    second = body(pixels)
    assert once > 20 and len(folds) == once
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and torch.equal(pixels, PIXELS)
    assert set(vars(body)) == attributes
    torch.testing.assert_close(dict(body.state_dict()), state, rtol=0, atol=0)
    assert [tensor._version for tensor in body.state_dict().values()] == versions

    file = io.BytesIO()
    torch.save(body, file)
    file.seek(0)
    for other in (copy.deepcopy(body), torch.load(file, weights_only=False)):
        other.body.conv1.weight.mul_(1.5)
        assert not torch.equal(other(pixels)[0], first[0]) and torch.equal(body(pixels)[0], first[0])
    assert len(folds) == 3 * once


@torch.no_grad()
def test_weights_are_packed_for_the_size_of_the_maps(monkeypatch):
    """Packed for another size, oneDNN may lay them out anew at every call."""
    sizes = []
    original = onednn.pack
    monkeypatch.setattr(onednn, "pack", lambda *arguments: sizes.append(arguments[3][-2:]) or original(*arguments))
    monkeypatch.setattr(onednn, "is_available", lambda dtype: dtype == torch.float32)
    body, head = build(), RPNHead(16, 3).eval().requires_grad_(False)
    for pixels in (PIXELS, PIXELS, PIXELS[..., :64], PIXELS):
        before = len(sizes)
        maps = body(pixels)
        assert len(sizes) == before or pixels.shape[-2:] in sizes[before:]
    assert len(sizes) % 3 == 0  # the second call packed nothing
    sizes.clear()
    for _ in range(2):
        _of_head(head, maps)
    assert len(sizes) == 2 * len(maps)  # every level's once: the hidden convolution's, and both outputs' as one


@pytest.mark.parametrize("broken", ["weight", "pixels"])
@torch.no_grad()
def test_what_is_not_finite_stays_so(broken):
    """ReLU in oneDNN's kernel makes 0 of NaN."""
    body, pixels = build(), PIXELS.clone()
    if broken == "weight":
        body.body.conv1.weight.fill_(torch.nan)
    else:
        pixels[:] = torch.nan
    assert all(y.isnan().any() for y in body(pixels))


@torch.no_grad()
def test_they_are_forgotten_in_training_and_with_the_module():
    body = build()
    body(PIXELS)
    assert body in networks._FOLDED
    body.train()
    assert body not in networks._FOLDED
    body.eval()(PIXELS)
    number = len(networks._FOLDED)
    del body
    assert len(networks._FOLDED) == number - 1


def test_maps_that_are_given_out_are_not_overwritten():
    """Residual sums are made in place, but never in a map that somebody has."""
    body = build("resnet18", neck="none")
    blocks = torchvision.models.resnet18(weights=None).layer1
    blocks = lively(nn.Sequential(*blocks))
    x = torch.randn(1, 64, 9, 9).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    with torch.no_grad():
        assert folded.sequence(body, blocks, x) is not None
    assert torch.equal(x, before)


# ---------------------------------------------------------------------------------------------
# Aside


class OtherConv(nn.Conv2d):
    pass


class OtherBlock(torchvision.models.resnet.BasicBlock):
    pass


def weird(body: ResNetFPN) -> None:
    body.body.conv1.weight = nn.Parameter(body.body.conv1.weight.as_subclass(Weird), requires_grad=False)


class Weird(Tensor):
    pass


GUARDS = {
    "hook": lambda body: body.body.layer2[0].conv1.register_forward_hook(lambda *_: None),
    "hook before": lambda body: body.body.layer2[0].register_forward_pre_hook(lambda *_: None),
    "hook on a container": lambda body: body.body.layer3.register_forward_hook(lambda *_: None),
    "hook on the pyramid": lambda body: body.fpn.register_forward_hook(lambda *_: None),
    "hook on the last level": lambda body: body.fpn.extra_blocks.register_forward_hook(lambda *_: None),
    "hook on ReLU": lambda body: body.body.layer1[0].relu.register_forward_hook(lambda *_: None),
    "hook backward": lambda body: body.body.conv1.register_full_backward_hook(lambda *_: None),
    "forward replaced": lambda body: setattr(body.body.layer1[0], "forward", lambda x: x),
    "the class's forward replaced": lambda body: None,
    "group norm": lambda body: setattr(body.body, "bn1", nn.GroupNorm(2, 64).eval()),
    "another class": lambda body: setattr(body.body.conv1, "__class__", OtherConv),
    "another block": lambda body: setattr(body.body.layer1[0], "__class__", OtherBlock),
    "another activation": lambda body: setattr(body.body.layer1[0], "relu", nn.ReLU6().eval()),
    "a part in training": lambda body: body.body.bn1.train(),
    "without statistics": lambda body: setattr(body.body, "bn1", nn.BatchNorm2d(64, track_running_stats=False).eval()),
    "compiled part": lambda body: body.body.layer4.compile(),
    "tensor subclass": weird,
    "another padding": lambda body: setattr(body.body.conv1, "padding_mode", "reflect"),
    "pruned": lambda body: prune.identity(body.body.conv1, "weight"),
    "parametrized": lambda body: register_parametrization(body.body.conv1, "weight", nn.Identity()),
    "mixed dtypes": lambda body: body.body.conv1.double(),
}  # fmt: skip


@pytest.mark.parametrize("guard", GUARDS)
@torch.no_grad()
def test_who_watches_or_differs_is_served(monkeypatch, runs, guard):
    body = build(norm="batch_norm")
    if guard == "the class's forward replaced":
        monkeypatch.setattr(
            nn.Conv2d, "forward", lambda self, x: torch.Tensor.relu(self._conv_forward(x, self.weight, self.bias))
        )
    GUARDS[guard](body)
    assert folded.backbone(body, body.body, body.fpn, PIXELS) is None and runs == []


def test_hooks_are_called(runs):
    body, seen = build(), []
    with torch.no_grad():
        body(PIXELS)
        handle = body.body.layer2.register_forward_hook(lambda *_: seen.append(1))
        body(PIXELS)
        handle.remove()
        body(PIXELS)
    assert seen == [1] and len(runs) == 2


def test_hooks_on_all_modules_are_called(runs):
    body, seen = build(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    with torch.no_grad():
        body(PIXELS)
    handle.remove()
    assert nn.Conv2d in seen and runs == []


def test_predict_replaced_is_called(runs):
    rpn = RPN(RPNConfig(), 8).eval().requires_grad_(False)
    rpn.predict = lambda x: "mine"
    with torch.no_grad():
        assert rpn._predict_all([torch.randn(1, 8, 4, 4)]) == ["mine"]


def test_gradients_and_tracers(runs):
    body = build()
    pixels = PIXELS[:1, :, :32, :32]
    body(pixels.clone().requires_grad_())[0].sum().backward()
    body.body.conv1.requires_grad_(True)
    assert body(pixels)[0].requires_grad and runs == []
    body.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        body(pixels)
    assert counter.get_total_flops() > 1e6 and runs == []
    with torch.no_grad():
        torch.jit.trace(body, pixels, check_trace=False)
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(body(forward_ad.make_dual(pixels, pixels))[0]).tangent
        torch.func.vmap(lambda x: body(x[None])[0])(pixels)
    assert tangent is not None and runs == []
    with torch.inference_mode():
        of_inference = copy.deepcopy(body)
        of_inference(pixels)
    assert runs == []
    with torch.inference_mode():
        body(pixels)
    assert len(runs) == 1


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_other_devices_and_shapes(runs, device):
    body = build()
    with nullcontext() if device == "cpu" else torch.device("meta"), torch.no_grad():
        assert folded.backbone(body, body.body, body.fpn, torch.empty(0 if device == "cpu" else 1, 3, 32, 32)) is None
    assert runs == []


def test_every_layer_is_read_once():
    body, reader = build("resnet50"), Reader()
    reader.body(body.body), reader.pyramid(body.fpn)
    read = [conv for _, conv, _ in reader.sources]
    assert len(read) == len(set(read)) == sum(type(module) is nn.Conv2d for module in body.modules())
