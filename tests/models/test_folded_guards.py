"""The folded networks are remembered as long as the weights, and stand aside where they may not run."""

import copy
import io
from contextlib import nullcontext

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import prune
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.rpn import RPNHead

from doublehead.config import RPNConfig
from doublehead.models import folded
from doublehead.models.backbone import ResNetFPN
from doublehead.models.folded import networks
from doublehead.models.folded.plan import Reader
from doublehead.models.folded.watch import Watch
from doublehead.models.rpn import RPN
from doublehead.ops import onednn
from tests.support.folded import PIXELS, as_modules, build, folded_runs, lively, of_head  # noqa: F401 (a fixture)

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
        of_head(head, maps)
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
    assert body in networks._FOLDED and body in networks._READ
    body.train()
    assert body not in networks._FOLDED and body not in networks._READ
    body.eval()(PIXELS)
    kept = networks._FOLDED, networks._READ
    numbers = [len(of) for of in kept]
    del body
    assert [len(of) for of in kept] == [number - 1 for number in numbers]


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
    "a weight on another device": lambda body: body.body.conv1.to("meta"),
}  # fmt: skip


@pytest.mark.parametrize("guard", GUARDS)
@torch.no_grad()
def test_who_watches_or_differs_is_served(monkeypatch, runs, guard):
    body = build(norm="batch_norm")
    body(PIXELS[:, :, :32, :32])
    assert runs.pop() == torch.float32 and not runs
    if guard == "the class's forward replaced":
        monkeypatch.setattr(
            nn.Conv2d, "forward", lambda self, x: torch.Tensor.relu(self._conv_forward(x, self.weight, self.bias))
        )
    GUARDS[guard](body)
    assert folded.backbone(body, body.body, body.fpn, PIXELS) is None and runs == []


def test_what_is_read_anew():
    """What reading modules depends on, and nothing else."""
    getter = IntermediateLayerGetter(torchvision.models.resnet18(weights=None), {"layer3": "0"}).eval()
    conv = getter.layer1[0].conv1
    changes = {
        "attribute": lambda: setattr(conv, "stride", (2, 2)),
        "weight": lambda: setattr(conv, "weight", nn.Parameter(conv.weight.detach())),
        "buffer": lambda: getter.bn1.register_buffer("running_mean", torch.zeros(64)),
        "module": lambda: setattr(getter.layer1[0], "relu", nn.ReLU().eval()),
        "maps": lambda: getter.return_layers.update(layer3="1"),
        "hook": lambda: conv.register_forward_pre_hook(lambda *_: None),
        "mode": lambda: getter.bn1.train(),
        "class": lambda: setattr(conv, "__class__", OtherConv),
    }
    for name, change in changes.items():
        watch = Watch([getter, None])
        assert watch.holds([getter, None]) and not watch.holds([getter, conv]) and not watch.holds([getter])
        change()
        assert not watch.holds([getter, None]), name
    watch = Watch([getter])
    with torch.no_grad():
        conv.weight.add_(1)  # that is for whoever folds the weights to see
    assert watch.holds([getter])


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
